"""A page of papers/: VAR's quantizer with its target low-passed."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from program import copied_run, opened_run, ran, rows_of

from papers import low_pass
from papers.low_pass import BANDS, LowPass
from sample import load_run
from support.checkpoint import load_checkpoint
from support.evaluation import evaluated_images, psnr
from tokenizer import Quantizer, TokenizerConfig

COUNT = 16
SHORT = ("--device", "cpu", "--count", COUNT)
SCALES = (1, 2, 3, 5)


def frequencies(keep_SS) -> set[tuple[int, int]]:
    """Of the upper right quarter."""
    S = len(keep_SS)
    assert torch.equal(keep_SS, keep_SS.T)
    assert torch.equal(keep_SS[1:], keep_SS[1:].flip(0))   # as many to the left as to the right
    return {(u, v) for u in range(S // 2 + 1) for v in range(S // 2 + 1) if keep_SS[u, v]}


def test_the_bands_of_the_paper():
    """Edges at 1, 5, 14, 39 and 103 parts in 103 of 4 sqrt(2) periods: 0.05, 0.27, 0.77, 2.14."""
    keep_KSS = BANDS["share"]((1, 2, 3, 5, 8))
    assert keep_KSS.sum(dim=(1, 2)).tolist() == [1, 1, 1, 13, 64]
    assert frequencies(keep_KSS[3]) == {(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0)}


def test_the_bands_of_the_sampling_theorem():
    keep_KSS = BANDS["sampling"]((1, 2, 3, 5, 8))
    assert keep_KSS.sum(dim=(1, 2)).tolist() == [1, 1, 9, 25, 64]
    assert frequencies(keep_KSS[2]) == {(0, 0), (0, 1), (1, 0), (1, 1)}


@pytest.fixture(name="plain")
def some_quantizer():
    torch.manual_seed(0)
    quantizer = Quantizer(TokenizerConfig(
        scales=SCALES, vocabulary=64, code_channels=4, image_channels=1, width=4, multipliers=(1,),
        blocks=1, phis=2, norm_groups=1))
    quantizer.codebook_VC.data.normal_()
    return quantizer


LATENT = torch.randn(6, 4, 5, 5, generator=torch.Generator().manual_seed(1))


def low_passed(f_BCSS, keep_SS) -> torch.Tensor:
    """A sum of waves, one by one."""
    places = torch.arange(5)
    result = torch.zeros_like(f_BCSS)
    for u, v in keep_SS.nonzero().tolist():
        angle_SS = 2 * torch.pi * (u * places[:, None] + v * places) / 5
        for wave_SS in (angle_SS.cos(), angle_SS.sin()):
            result += (f_BCSS * wave_SS).mean(dim=(2, 3), keepdim=True) * wave_SS
    return result


@pytest.mark.parametrize("bands", BANDS.values())
def test_every_scale_codes_what_is_under_its_edge(plain, bands):
    keep_KSS = bands(SCALES)
    quantizer = LowPass(plain, keep_KSS)
    f_hat = plain.initial(6)
    tokens = []
    residuals = []
    for k in range(4):
        residuals.append(plain.read(low_passed(LATENT, keep_KSS[k]) - f_hat, k))
        tokens.append(plain.nearest(residuals[-1]))
        f_hat = plain.accumulate(f_hat, tokens[-1], k)
    tokens = torch.cat(tokens, dim=1)
    assert torch.equal(quantizer.encode(LATENT), tokens)
    assert not torch.equal(plain.encode(LATENT), tokens)
    straight, loss = quantizer(LATENT)
    assert torch.equal(quantizer.last_tokens_BL, tokens)
    for found, expected in zip(quantizer.last_residuals, residuals, strict=True):
        assert torch.allclose(found, expected, atol=1e-5)
    assert torch.allclose(straight, f_hat, atol=1e-5)
    loss.backward()
    assert plain.codebook_VC.grad.abs().sum() > 0   # an optimizer of the plain one has the weights


def test_the_codebook_starts_from_low_frequencies(plain):
    """A fine wave alone: in means of areas it is something, under the edge of a 3x3 map nothing."""
    wave = (torch.arange(5.0) * 2 * torch.pi * 2 / 5).cos().expand(6, 4, 5, 5).clone()
    for phi in plain.phis:
        phi.bias.data.zero_()   # else the sum is something before any code is
    fine = []
    for quantizer in (plain, LowPass(plain, BANDS["sampling"](SCALES))):
        torch.manual_seed(0)
        quantizer.codebook_VC.data.zero_()
        quantizer.start_from(wave)
        fine.append(quantizer.codebook_VC[16:48].abs().max())   # what the 2x2 and 3x3 maps gave
        assert quantizer.codebook_VC[48:].abs().max() > 0.5
    assert fine[0] > 0.1 and fine[1] < 1e-5


def test_the_transformer_reads_all_of_the_sum(plain):
    tokens = plain.encode(LATENT)
    inputs = plain.teacher_inputs(tokens)
    quantizer = LowPass(plain, BANDS["share"](SCALES))
    quantizer.encode(LATENT)
    assert torch.equal(quantizer.teacher_inputs(tokens), inputs)
    assert list(quantizer.state_dict()) == list(plain.state_dict())


def test_the_page_on_low_pass(judged, tmp_path, monkeypatch):
    folder = copied_run(judged, tmp_path / "shapes")
    started = []
    start_from = LowPass.start_from
    monkeypatch.setattr(LowPass, "start_from", lambda self, f_BCSS: started.append(
        self.training) or start_from(self, f_BCSS))
    found = []
    evaluate = low_pass.evaluate
    monkeypatch.setattr(low_pass, "evaluate", lambda *what, **how: found.append(
        evaluate(*what, **how)) or found[-1])
    said = ran("papers.low_pass", "--run", folder, *SHORT, "--tokenizer-steps", 5,
               "--var-steps", 2)
    assert started == [True, True]   # these were trained, not their average alone
    kinds = ["plain", "share", "sampling"]
    assert list(rows_of(said, 7))[:3] == kinds
    assert "share: frequencies up to each scale [1, 1, 16]" in said
    rows = rows_of(said, 6)
    run = opened_run(folder, *SHORT)
    images, labels = evaluated_images(run, COUNT)
    for i, kind in enumerate(kinds):
        out = folder / "papers" / f"low_pass-{kind}"
        preset = load_checkpoint(out / "var.pt", "transformer")["preset"]
        assert (preset["tokenizer_steps"], preset["var_steps"]) == (5, 2)
        part = load_run(out, run.machine)
        quantizer = part.tokenizer.quantizer
        if kind != "plain":
            part.tokenizer.quantizer = LowPass(quantizer, BANDS[kind]((1, 2, 4)))
        tokens = part.encode(images)[1]
        nats = -part.log_likelihoods(tokens, labels.tolist()).mean(dim=0)
        decibels = [psnr((part.decode(tokens[:, :end]) - images).square().mean().item())
                    for end in (1, 5, 21)]
        expected = [*(x.sum().item() for x in nats.split((1, 4, 16))), *decibels]
        assert rows[kind] == pytest.approx(expected, abs=0.006)
        assert found[i].nats_per_image == pytest.approx(nats.sum().item(), abs=1e-3)
        assert found[i].psnr == pytest.approx(decibels[-1], abs=1e-4)
    plain, *others = found
    figures = []
    for other in others:
        figures.append(100 * (1 - other.nats_per_image / plain.nats_per_image))
        figures.append(other.psnr - plain.psnr)
    for claim, figure in zip(low_pass.CLAIMS, figures, strict=True):
        measured = float(said.split(f"claim: {claim.text}\n")[1].split()[1].rstrip(":"))
        assert measured == pytest.approx(figure, abs=2e-3)


def test_what_is_claimed_of_low_pass(judged, monkeypatch):
    run = opened_run(judged, *SHORT)
    nats = {"plain": 200.0, "share": 160.0, "sampling": 250.0}
    decibels = {"plain": 20.0, "share": 23.0, "sampling": 19.5}
    monkeypatch.setattr(low_pass, "open_runs", lambda _: [run])
    monkeypatch.setattr(low_pass, "trained", lambda run, kind, *_: kind)
    monkeypatch.setattr(low_pass, "evaluate", lambda *_, **__: None)
    monkeypatch.setattr(low_pass, "by_scale", lambda kind, _: [1, 2, 3, 4, 5, decibels[kind]])
    monkeypatch.setattr(low_pass, "say_evaluations", lambda _: {
        kind: np.array([[x, 1, 2, 3, 4, 5, 6]]) for kind, x in nats.items()})
    said = ran("papers.low_pass")
    for claim, figure in zip(low_pass.CLAIMS, (20, 3, -25, -0.5), strict=True):
        assert f"claim: {claim.text}\n    measured {figure:.4f}: " in said
