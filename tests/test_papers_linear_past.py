"""A page of papers/: own-scale attention with a linear memory of the past."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from program import copied_run, opened_run, ran, rows_of, tuned_in, with_moved_weights

from papers import UNFILTERED, linear_past
from papers.linear_past import LinearPast, LinearVAR, Memory
from support.checkpoint import fingerprint, load_checkpoint
from support.evaluation import evaluated_images

COUNT = 16
SHORT = ("--device", "cpu", "--count", COUNT)


@pytest.fixture(scope="module")
def folder(judged, tmp_path_factory):
    return copied_run(judged, tmp_path_factory.mktemp("linear_past") / "shapes")


@pytest.fixture(scope="module")
def opened(folder):
    return with_moved_weights(opened_run(folder, *SHORT))


@pytest.fixture(scope="module")
def real(opened):
    """What is read of held-out images, and their labels."""
    images, labels = evaluated_images(opened, COUNT)
    return opened.tokenizer.teacher_inputs(opened.encode(images)[1]), labels


def test_the_memory_by_hand():
    """A mean of the values so far, weighed by phi(q) phi(k); nothing of the scale itself."""
    torch.manual_seed(0)
    q, k = (torch.rand(2, 3, 7, 4) for _ in range(2))
    v = torch.randn(2, 3, 7, 4)
    memory = Memory()
    memory.add(k[:, :, :1], v[:, :, :1])
    assert torch.allclose(memory.read(q[:, :, 1:5]), v[:, :, :1].expand(-1, -1, 4, -1), atol=1e-6)
    memory.add(k[:, :, 1:5], v[:, :, 1:5])
    weights = q[:, :, 5:] @ k[:, :, :5].mT
    expected = weights / weights.sum(dim=3, keepdim=True) @ v[:, :, :5]
    assert torch.allclose(memory.read(q[:, :, 5:]), expected, atol=1e-5)
    assert memory.sum_BHDX.shape == (2, 3, 4, 5)


def test_a_layer_by_hand(opened):
    """Place by place: own scale by softmax, the past linearly, by a quarter at first."""
    attention = opened.model.blocks[0].attention
    layer = LinearPast(attention, opened.model.config)
    torch.manual_seed(0)
    x = torch.randn(1, 21, 32, requires_grad=True)
    q, k, v, scale = attention.project(x)
    phi_q, phi_k = ((4 * y / y.norm(dim=3, keepdim=True)).exp() for y in (q, k))
    rows = []
    for i in range(21):
        begin, end = next((s.start, s.stop) for s in opened.model.config.spans if i < s.stop)
        own = (scale * q[:, :, i:i + 1] @ k[:, :, begin:end].mT).softmax(dim=3) @ v[:, :, begin:end]
        if begin:
            weights = phi_q[:, :, i:i + 1] @ phi_k[:, :, :begin].mT
            past = weights / weights.sum(dim=3, keepdim=True) @ v[:, :, :begin]
            own = 0.75 * own + 0.25 * past
        rows.append(own)
    expected = attention.out(torch.cat(rows, dim=2).transpose(1, 2).flatten(2))
    found = layer(x, None, None)
    assert torch.allclose(found, expected, atol=1e-4)
    towards = torch.randn(1, 21, 32)
    slopes = [torch.autograd.grad((o * towards).sum(), x)[0] for o in (found, expected)]
    assert torch.allclose(*slopes, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_memory_is_kept_in_fp32(opened, real, dtype):
    """As on a GPU: its sums would overflow in fp16."""
    inputs, labels = real
    model = LinearVAR(opened.model).eval()
    for block in model.blocks:
        torch.nn.init.constant_(block.attention.t_H11, 10)
    with torch.no_grad():
        expected = model(labels, inputs)
        with torch.autocast("cpu", dtype):
            assert torch.allclose(model(labels, inputs), expected, atol=0.05)


def test_a_memory_that_is_never_read_is_own_scale_attention(opened, real):
    inputs, labels = real
    model = LinearVAR(opened.model).eval()
    own = linear_past.own_scale(opened.model).eval()
    assert own.config.last_scales == 1
    with torch.no_grad():
        assert not torch.allclose(model(labels, inputs), own(labels, inputs), atol=1e-2)
        for block in model.blocks:
            block.attention.odds_H11.fill_(-100)
        assert torch.allclose(model(labels, inputs), own(labels, inputs), atol=1e-4)
        assert not torch.allclose(own(labels, inputs), opened.model(labels, inputs), atol=1e-2)


def test_later_scales_move_nothing(opened, real):
    inputs, labels = real
    model = LinearVAR(opened.model).eval()
    changed = inputs.clone()
    changed[:, 4:] += 1   # what the 4x4 map reads
    with torch.no_grad():
        assert torch.equal(model(labels, changed)[:, :5], model(labels, inputs)[:, :5])


@pytest.mark.parametrize("cfg", [0.0, 2.0])
def test_drawing_computes_what_training_does(opened, cfg, monkeypatch):
    model = LinearVAR(opened.model).eval()
    logits = []
    draw = model.draw
    monkeypatch.setattr(model, "draw", lambda *rest: logits.append(rest[0]) or draw(*rest))
    part = replace(opened, model=model, sampling=replace(UNFILTERED, cfg=cfg))
    tokens = part.generate([0, 3, 5, 5], 7)
    labels = torch.tensor([0, 3, 5, 5] + [10] * 4)[:8 if cfg else 4]
    inputs = opened.tokenizer.teacher_inputs(tokens.repeat(len(labels) // 4, 1))
    with torch.no_grad():
        expected = model(labels, inputs)
    assert torch.allclose(torch.cat(logits, dim=1), expected, atol=1e-3)


def test_the_page_on_a_linear_past(folder, monkeypatch):
    found = []
    evaluate = linear_past.evaluate

    def evaluated(*what, **how):
        assert how == {"seeds": [0]}
        found.append(evaluate(*what, **how))
        found[-1].unfiltered[0].recognised += 0.01 * len(found)   # else all are recognised alike
        return found[-1]

    monkeypatch.setattr(linear_past, "evaluate", evaluated)
    said = ran("papers.linear_past", "--run", folder, *SHORT, "--steps", 2, "--lr", 0.02)
    rows = rows_of(said, 7)
    assert list(rows)[:3] == ["plain", "own scale", "linear"]
    assert "160 numbers, keys and values; linear: 272" in said
    run = opened_run(folder, *SHORT)
    images, labels = evaluated_images(run, COUNT)
    tokens = run.encode(images)[1]
    tuned = tuned_in(folder)
    assert set(tuned) == {"hmar-plain", "linear_past-own", "linear_past-linear"}
    assert all((how["steps"], how["lr"]) == (2, 0.02) for how in tuned.values())
    models = {"own scale": linear_past.own_scale(run.model), "linear": LinearVAR(run.model)}
    for name, model in models.items():
        path = folder / "papers" / f"linear_past-{name.split()[0]}" / "var.pt"
        content = load_checkpoint(path, "transformer")
        assert content["made_with"]["first weights"] == fingerprint(model)   # those of the run
        state = content["model"]
        model.load_state_dict(state)
        likelihood = replace(run, model=model.eval()).log_likelihood(tokens, labels.tolist())
        assert rows[name][0] == pytest.approx(-likelihood.mean().item(), abs=0.006)
    t_H11 = state["blocks.0.attention.t_H11"]
    assert t_H11.unique().numel() == 2 and not torch.allclose(t_H11, torch.tensor(4.0))
    # What tells them apart after two steps is little, so it is not taken from the rounded table.
    plain, own, linear = found
    cut, left = (x.nats_per_image - plain.nats_per_image for x in (own, linear))
    more = 100 * (linear.unfiltered[0].recognised - plain.unfiltered[0].recognised)
    for claim, figure in zip(linear_past.CLAIMS, (cut / 21, 1 - left / cut, more), strict=True):
        measured = float(said.split(f"claim: {claim.text}\n")[1].split()[1].rstrip(":"))
        assert measured == pytest.approx(figure, rel=1e-3, abs=1e-4)
