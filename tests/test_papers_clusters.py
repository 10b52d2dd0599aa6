"""A page of papers/: clusters first, then codes."""
from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from program import (
    copied_run, of_three_codes, opened_run, ran, refused, rows_of, tuned_in, with_moved_weights,
)

from papers import FILTERED, UNFILTERED, clusters, hmar
from papers.clustered import ClusteredVAR, ClusterLoss, TwoPasses, k_means, of_clusters
from sample import Run
from support.checkpoint import load_checkpoint
from support.cli import UserError
from support.evaluation import Judge, evaluated_images, kept_classifier
from var import VAR

COUNT = 20
SHORT = ("--device", "cpu", "--count", COUNT)


@pytest.fixture(scope="module")
def folder(judged, tmp_path_factory):
    return copied_run(judged, tmp_path_factory.mktemp("clusters") / "shapes")


@pytest.fixture(scope="module")
def opened(folder):
    return with_moved_weights(opened_run(folder, *SHORT))


@pytest.fixture(scope="module")
def real(opened):
    """Held-out images' tokens and labels."""
    images, labels = evaluated_images(opened, COUNT)
    return opened.encode(images)[1], labels


def heeding(plain: VAR, cluster_V: torch.Tensor) -> ClusteredVAR:
    """A model that heeds the clusters that it is told."""
    model = ClusteredVAR(plain, cluster_V).eval()
    torch.manual_seed(1)
    torch.nn.init.normal_(model.code_embedding.known.weight)
    return model


OF_THREE = torch.tensor([1, 0, 1])
IMAGES = torch.tensor(list(itertools.product(range(3), repeat=5)))


# ------------------------------------------------------------------------------------------------
# The likelihood


def test_clusters_and_then_codes_are_a_likelihood():
    """Over all images probabilities sum up to 1; and over all codes of a place's cluster."""
    tokenizer, plain = of_three_codes()
    model = heeding(plain, OF_THREE)
    labels = torch.ones(len(IMAGES), dtype=torch.long)
    with torch.no_grad():
        nats = model.nats(tokenizer, IMAGES, labels).double()
    assert (-nats.sum(dim=(0, 2))).exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert nats[1][:, 1:][IMAGES[:, 1:] == 1].abs().max() < 1e-6   # alone in its cluster
    with torch.no_grad():
        one = F.cross_entropy(plain(labels, tokenizer.teacher_inputs(IMAGES)).mT, IMAGES,
                              reduction="none").double()
    assert not torch.allclose(nats.sum(dim=(0, 2)), one.sum(dim=1), atol=1e-2)
    clusters_BL = OF_THREE[IMAGES]
    same = (clusters_BL == clusters_BL[7]).all(dim=1) & (IMAGES[:, 0] == IMAGES[7, 0])
    assert (-nats[1][same, 1:].sum(dim=1)).exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert torch.allclose(nats[0][same], nats[0][7].expand(int(same.sum()), -1), atol=1e-5)


def test_the_likelihood_by_hand():
    """Pass by pass, place by place, from what the model says."""
    tokenizer, plain = of_three_codes()
    model = heeding(plain, OF_THREE)
    for tokens in IMAGES[::40]:
        tokens, label = tokens[None], torch.tensor([0])
        with torch.no_grad():
            found = model.nats(tokenizer, tokens, label)
            read = tokenizer.teacher_inputs(tokens)
            first = model(label, read)[0].softmax(dim=1)
            one_hot = torch.eye(2)[OF_THREE[tokens[:, 1:]]]
            second = model(label, torch.cat([read, one_hot], dim=2))[0].softmax(dim=1)
        for i, token in enumerate(tokens[0].tolist()):
            own = OF_THREE == OF_THREE[token]
            of_cluster, of_code = (-found[:, 0, i]).exp().tolist()
            assert of_cluster == pytest.approx(first[i][own].sum().item(), rel=1e-4)
            expected = second[i, token] / second[i][own].sum()
            assert of_code == pytest.approx(expected.item(), rel=1e-4)


def test_a_cluster_without_a_chance_is_no_infinity():
    """Of two of which guidance would make something that is no number."""
    logits = torch.tensor([[[0.0, 0.0, -1000.0]]])
    assert of_clusters(logits, torch.tensor([0, 0, 1])).isfinite().all()


def test_untuned_it_is_plain_var(opened, real):
    tokens, labels = real
    model = ClusteredVAR(opened.model, torch.arange(32) % 5).eval()
    run = replace(opened, sampling=replace(FILTERED, batch=8))   # three batches
    nats = clusters.in_parts(run, model.nats, tokens, labels).sum(dim=0)
    plain = -opened.log_likelihoods(tokens, labels.tolist())
    assert torch.allclose(nats, plain, atol=1e-3)


def test_a_cluster_of_a_scale_moves_no_other_scale(opened, real):
    """But all places of its own, and what they say of their codes, never of their clusters."""
    tokens, labels = real
    model = heeding(opened.model, torch.arange(32) % 5)
    read = opened.tokenizer.teacher_inputs(tokens)
    cluster = model.cluster_V[tokens]
    changed = cluster.clone()
    changed[:, 3] = (cluster[:, 3] + 1) % 5   # of the 2x2 map
    with torch.no_grad():
        first, second = (model(labels, model.told(read, x[:, 1:])) for x in (cluster, changed))
    assert torch.equal(first[:, :1], second[:, :1])
    assert (first[:, 1:5] != second[:, 1:5]).any(dim=2).all()


# ------------------------------------------------------------------------------------------------
# Drawing


@pytest.mark.parametrize("cfg", [0.0, 2.0])
def test_drawing_says_what_the_likelihood_says(opened, cfg, monkeypatch):
    """Of what was drawn: logits in drawing are those of teacher forcing, with all scales."""
    model = heeding(opened.model, torch.arange(32) % 5)
    drawn = []
    draw = model.draw
    how = cfg, 5, 0.9, torch.Generator().manual_seed(0), 3.0

    def noted(logits, k, *rest):
        assert rest == how
        drawn.append(logits)
        return draw(logits, k, *rest)

    monkeypatch.setattr(model, "draw", noted)
    labels = torch.tensor([0, 3, 5, 5])
    tokens = model.generate(opened.tokenizer, labels, *how[:4], growth=3.0)
    kinds = labels
    if cfg:
        kinds = torch.cat([labels, torch.full_like(labels, model.config.classes)])
    repeated = tokens.repeat(len(kinds) // 4, 1)
    read = opened.tokenizer.teacher_inputs(repeated)
    cluster = model.cluster_V[repeated]
    with torch.no_grad():
        first = of_clusters(model(kinds, read), model.cluster_V)
        second = model.of_codes(model(kinds, model.told(read, cluster[:, 1:])), cluster)
    assert torch.allclose(torch.cat(drawn[::2], dim=1), first, atol=1e-4)
    assert torch.allclose(torch.cat(drawn[1::2], dim=1), second, atol=1e-3)


def test_images_are_drawn_as_often_as_is_likely():
    """The share of each image of five tokens, against its probability."""
    tokenizer, plain = of_three_codes()
    model = heeding(plain, OF_THREE)
    count = 20_000
    labels = torch.ones(count, dtype=torch.long)
    drawn = model.generate(tokenizer, labels, 0.0, 0, 1.0, torch.Generator().manual_seed(0))
    share = (drawn @ 3 ** torch.arange(4, -1, -1)).bincount(minlength=len(IMAGES)) / count
    with torch.no_grad():
        chance = (-model.nats(tokenizer, IMAGES, labels[:len(IMAGES)]).sum(dim=(0, 2))).exp()
        one = F.cross_entropy(plain(labels[:len(IMAGES)], tokenizer.teacher_inputs(IMAGES)).mT,
                              IMAGES, reduction="none")
    noise = (chance * (1 - chance) / count).sqrt().sum()
    assert (share - chance).abs().sum() < 1.2 * noise
    assert (share - (-one.sum(dim=1)).exp()).abs().sum() > 3 * noise


@pytest.mark.parametrize("sampling", [FILTERED, UNFILTERED])
def test_a_code_is_of_the_cluster_that_was_drawn(opened, sampling, monkeypatch):
    model = heeding(opened.model, torch.arange(32) % 5)
    drawn = []
    draw = model.draw
    monkeypatch.setattr(model, "draw", lambda *rest: drawn.append(draw(*rest)) or drawn[-1])
    tokens = replace(opened, model=model, sampling=sampling).generate([0, 3, 5, 5], 7)
    assert torch.equal(model.cluster_V[tokens], torch.cat(drawn[::2], dim=1))
    assert torch.equal(tokens, torch.cat(drawn[1::2], dim=1))


# ------------------------------------------------------------------------------------------------
# Clusters, and losses


def test_k_means():
    torch.manual_seed(0)
    centres = torch.tensor([[9.0, 0.0], [0.0, 9.0], [-9.0, -9.0], [9.0, 9.0]])
    kind = torch.arange(40) % 4
    codebook = centres[kind] + torch.randn(40, 2)
    found = k_means(codebook, 4)
    for x in range(4):   # it may have started with two of one, but each is in some cluster
        assert 0 <= found[x] < 4
    torch.manual_seed(0)
    line = torch.randn(12, 1)   # here some clusters are left with a single code
    for codes, own in ((codebook, found), (line, k_means(line, 5))):
        means = torch.stack([codes[own == x].mean(dim=0) for x in own.unique()])
        nearest = (codes[:, None] - means).square().sum(dim=2).argmin(dim=1)
        assert torch.equal(own.unique()[nearest], own)   # a fixed point
    spread = sum((codebook[found == x] - codebook[found == x].mean(dim=0)).square().sum()
                 for x in found.unique())
    assert spread < 0.2 * (codebook - codebook.mean(dim=0)).square().sum()
    torch.manual_seed(1)
    first = torch.randperm(40)[:4]
    torch.manual_seed(1)
    assert k_means(codebook, 4, rounds=1)[first].tolist() == [0, 1, 2, 3]   # it starts at these
    torch.manual_seed(0)
    codebook = torch.cat([torch.zeros(5, 2), torch.ones(5, 2)])   # only two of them are in use
    assert len(k_means(codebook, 4).unique()) == 2


def test_the_losses_by_hand(opened, real):
    tokens, labels = (x[:6] for x in real)
    of_V = torch.arange(32) % 5
    run = replace(opened, model=heeding(opened.model, of_V))
    run.model.config = replace(run.model.config, label_dropout=0.0)
    stage = TwoPasses(run, run.model, "none", 1, 1e-3)
    loss, to_log = stage.loss(run.model, tokens.short(), labels)
    first, second = run.model.nats(run.tokenizer, tokens, labels)
    same_loss(loss, first[::2].mean() + second[1::2].mean(), run.model)
    assert to_log() == {}
    plain = replace(opened, model=VAR(replace(opened.model.config, label_dropout=0.0)))
    plain.model.load_state_dict(opened.model.state_dict())
    stage = ClusterLoss(plain, of_V, 1, 1e-3)
    assert stage.made_with["clusters"] == of_V.tolist()   # --resume takes no others
    loss, to_log = stage.loss(plain.model, tokens.short(), labels)
    logits = plain.model(labels, run.tokenizer.teacher_inputs(tokens)).log_softmax(dim=2)
    of_token = -logits.gather(2, tokens[..., None])
    same = (of_V[tokens][..., None] == of_V).float()
    of_cluster = -(logits.exp() * same).sum(dim=2).log()
    same_loss(loss, of_cluster.mean() + of_token.mean(), plain.model)
    assert to_log() == {}


def same_loss(found, expected, model):
    """The number, and what is learned from it."""
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    of_found, of_expected = (
        torch.autograd.grad(loss, model.head.bias)[0] for loss in (found, expected))
    assert torch.allclose(of_found, of_expected, atol=1e-6)


def test_tokens_are_replaced_within_their_clusters():
    of_V = torch.tensor([0, 1, 0, 2, 0])
    tokens = torch.tensor([[0, 1, 2, 3, 4]]).expand(900, 5)
    torch.manual_seed(0)
    found = clusters.replaced(tokens, of_V)
    assert torch.equal(of_V[found], of_V[tokens])
    share = (found[:, :1] == torch.tensor([0, 2, 4])).float().mean(dim=0)
    assert share.tolist() == pytest.approx([1 / 3] * 3, abs=0.06)


# ------------------------------------------------------------------------------------------------
# The page


def test_the_page_on_clusters(folder, monkeypatch):
    seen = []
    decode = Run.decode
    monkeypatch.setattr(Run, "decode", lambda run, tokens: seen.append(tokens) or
                        decode(run, tokens))
    # Whatever is replaced, more is recognised than before: by the classifier all may be alike.
    monkeypatch.setattr(clusters, "Judge", lambda *_: lambda images, labels: SimpleNamespace(
        recognised=0.1 * len(seen)))
    flags = ("--run", folder, *SHORT, "--steps", 2, "--lr", 0.02, "--clusters", 4)
    said = ran("papers.clusters", *flags)
    drawn = rows_of(said, 7)
    assert list(drawn)[:4] == ["plain", "iar", "clusters", "lot"]
    nats = rows_of(said, 3)
    names = ["plain", "iar", "clusters", "lot", "checkerboard"]
    assert all(name in nats for name in names)
    run = opened_run(folder, *SHORT)
    images, labels = evaluated_images(run, COUNT)
    tokens = run.encode(images)[1]
    assert nats["plain"][0] == pytest.approx(drawn["plain"][0], abs=0.02)
    torch.manual_seed(run.settings.seed)
    of_V = k_means(run.tokenizer.quantizer.codebook_VC, 4)
    content = load_checkpoint(folder / "papers" / "clusters-clusters" / "var.pt", "transformer")
    assert torch.equal(content["model"]["cluster_V"], of_V)
    model = ClusteredVAR(run.model, of_V)
    model.load_state_dict(content["model"])
    assert model.code_embedding.known.weight.any()
    found = clusters.in_parts(run, model.eval().nats, tokens, labels).sum(dim=2).mean(dim=1)
    assert nats["clusters"] == pytest.approx([found.sum().item(), *found.tolist()], abs=0.01)
    assert drawn["clusters"][0] == pytest.approx(nats["clusters"][0], abs=0.02)
    part = clusters.TwoPassRun(**vars(replace(run, model=model, sampling=UNFILTERED)))
    judged = Judge(kept_classifier(run), images, run.classes)(
        run.decode(part.generate(labels.tolist(), 0)), labels)
    assert drawn["clusters"][1] == pytest.approx(100 * judged.recognised, abs=0.006)
    lot = load_checkpoint(folder / "papers" / "clusters-lot" / "var.pt", "transformer")["model"]
    assert torch.equal(lot["cluster_V"].bincount(), of_V.bincount())
    assert not torch.equal(lot["cluster_V"], of_V)
    of_all, of_last = seen[:2]
    torch.manual_seed(0)   # whatever was trained before
    assert torch.equal(of_all, clusters.replaced(tokens, of_V))
    assert torch.equal(of_V[of_all], of_V[tokens]) and not torch.equal(of_all[:, :5], tokens[:, :5])
    assert torch.equal(of_last, torch.cat([tokens[:, :5], of_all[:, 5:]], dim=1))
    shares = rows_of(said, 2)
    assert shares["clusters"] == [10, 20] and shares["lot"] == [30, 40]
    figures = [100 * (1 - nats["clusters"][0] / nats["plain"][0]),
               nats["lot"][0] - nats["clusters"][0],
               nats["checkerboard"][0] - nats["clusters"][0],
               drawn["clusters"][1] - drawn["plain"][1], drawn["iar"][1] - drawn["plain"][1],
               shares["clusters"][0]]
    for claim, figure in zip(clusters.CLAIMS, figures, strict=True):
        measured = said.split(f"claim: {claim.text}\n")[1].split()[1].rstrip(":")
        assert float(measured) == pytest.approx(figure, abs=0.02)
    tuned = tuned_in(folder)
    assert set(tuned) == {
        "hmar-plain", "hmar-masked", "clusters-iar", "clusters-clusters", "clusters-lot"}
    assert all((how["steps"], how["lr"]) == (2, 0.02) for how in tuned.values())
    rival = rows_of(ran("papers.hmar", "--run", folder, *SHORT, "--steps", 2, "--lr", 0.02,
                        "--resume"), 3)
    assert nats["checkerboard"][0] == rival["masked, two passes"][0]
    assert sum(nats["checkerboard"][1:]) == pytest.approx(nats["checkerboard"][0], abs=0.02)
    assert nats["checkerboard"][2] == rival["masked, two passes"][2]
    assert "--clusters 32 must" in refused("papers.clusters", *flags[:-1], 32)
    assert hmar.checkerboard(run.model).sum() == 1 + 2 + 8


def test_what_is_claimed_of_clusters(opened, monkeypatch):
    """Of figures of which no two are as far apart as others."""
    names = ("plain", "iar", "clusters", "lot")
    nats = dict(zip((*names, "checkerboard"), ([x, 0, 0] for x in (100, 201, 80, 83, 91))))
    shares = {"clusters": [70, 71], "lot": [40, 41]}
    monkeypatch.setattr(clusters, "open_runs", lambda _: [opened])
    monkeypatch.setattr(clusters, "measure", lambda *_: (dict.fromkeys(names), nats, shares))
    monkeypatch.setattr(clusters, "say_evaluations", lambda rows: {
        name: np.array([[0, 2.0**n, 5.0**n, 0, 0, 0, 0]]) for n, name in enumerate(rows)})
    said = ran("papers.clusters")
    assert "iar: difference" in said and "plain: difference" not in said
    for claim, figure in zip(clusters.CLAIMS, (20, 3, 11, 3, 1, 70), strict=True):
        assert f"claim: {claim.text}\n    measured {figure:.4f}: " in said


def test_clusters_begin_by_the_seed_of_the_run(run, monkeypatch):
    run.settings = replace(run.settings, seed=3)

    def k_means(*_):
        raise UserError(f"began by {torch.initial_seed()}")

    monkeypatch.setattr(clusters, "k_means", k_means)
    with pytest.raises(UserError, match="began by 3"):
        clusters.measure(run, 4, 1, 0.02, COUNT)
