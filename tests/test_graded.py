"""What the assignments promise and no other test holds a solution to: small cases, worked out."""
import pytest
import torch
import torch.nn.functional as F
from test_kernels import DEVICE, attention_tiles
from test_tokenizer import quantizer, tokenizer
from test_var import Recorder, config, known_left, lively

import kernels
import sample
from kernels import KeyRanges
from var import VAR, LayerCache

# -------------------------------------------------------------------------------------------------
# The tokenizer


@torch.no_grad()
def test_the_running_sum_is_computed_in_fp32_under_autocast():
    made = quantizer().float()
    tokens_Bl = torch.randint(8, (3, 4))
    f_hat_BCSS = torch.randn(3, 2, 4, 4)
    expected = made.accumulate(f_hat_BCSS, tokens_Bl, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made.accumulate(f_hat_BCSS, tokens_Bl, 1), expected)


@torch.no_grad()
def test_areas_that_overlap_are_averaged_row_by_row():
    """3 areas of 4 places: 0-1, 1-2 and 2-3 along each side."""
    made = tokenizer()
    f_BCSS = torch.arange(16.0).view(1, 1, 4, 4).expand(1, 4, 4, 4)
    expected = [2.5, 3.5, 4.5, 6.5, 7.5, 8.5, 10.5, 11.5, 12.5]
    torch.testing.assert_close(made.quantizer.read(f_BCSS, 2)[0, :, 0], torch.tensor(expected))


@torch.no_grad()
@pytest.mark.parametrize("scales, L", [((1, 2, 4), 1), ((1, 2, 4), 5), ((1, 3, 4), 10)])
def test_the_first_maps_alone_are_decoded(scales, L):
    made = quantizer(scales=scales)
    tokens_BL = torch.randint(8, (2, L))
    f_hat_BCSS = made.empty(2)
    for k, tokens_Bl in enumerate(made.split(tokens_BL)):
        f_hat_BCSS = made.accumulate(f_hat_BCSS, tokens_Bl, k)
    assert torch.equal(made.decode(tokens_BL), f_hat_BCSS)


@torch.no_grad()
def test_neighbouring_scales_share_a_phi():
    made = quantizer(scales=(1, 2, 3, 4), phis=2)
    for k, used in enumerate((0, 0, 1, 1)):
        tokens_Bl = torch.randint(8, (2, (k + 1)**2))
        before = made.accumulate(made.empty(2), tokens_Bl, k)
        made.phis[1 - used].weight.normal_()
        assert torch.equal(made.accumulate(made.empty(2), tokens_Bl, k), before)
        made.phis[used].weight.normal_()
        assert not torch.equal(made.accumulate(made.empty(2), tokens_Bl, k), before)


@torch.no_grad()
def test_the_first_codes_are_of_any_images():
    made = quantizer(vocabulary=30)
    made.start_from(torch.arange(100.0).double().view(100, 1, 1, 1).expand(100, 2, 4, 4))
    assert len(made.codebook_VC[:10, 0].unique()) > 5
    assert made.codebook_VC[:10, 0].max() > 50


def test_the_codebook_stays_the_parameter_that_it_was():
    """An optimizer and a checkpoint hold on to it; and integers count hits of any size."""
    made = quantizer(vocabulary=9).requires_grad_()
    codebook_VC, hits_V = made.codebook_VC, made.hits_V
    made.start_from(torch.randn(3, 2, 4, 4, dtype=torch.float64, requires_grad=True))
    made.update_hits(torch.full((9,), 2**24 + 1))
    made.hits_V[0] = 0
    optimizer = torch.optim.AdamW(made.parameters())
    moments = {name: torch.ones(9, 2) for name in ("exp_avg", "exp_avg_sq")}
    optimizer.state[codebook_VC] = dict(moments)
    assert made.revive([torch.ones(2, s * s, 2).double() for s in made.scales], optimizer) == 1
    assert made.codebook_VC is codebook_VC and codebook_VC.is_leaf and codebook_VC.requires_grad
    assert made.hits_V is hits_V and hits_V.dtype == torch.float64 and codebook_VC[0].eq(1).all()
    assert moments["exp_avg_sq"][1:].eq(1).all()
    made.hits_V.fill_(1.0)
    assert made.revive([torch.ones(2, s * s, 2).double() for s in made.scales], optimizer) == 0


# -------------------------------------------------------------------------------------------------
# Key ranges


@pytest.mark.parametrize("last_scales, first, last", [
    (None, [0] * 14, [1] + [5] * 4 + [14] * 9),
    (1, [0] + [1] * 4 + [5] * 9, [1] + [5] * 4 + [14] * 9),
    (2, [0] * 5 + [1] * 9, [1] + [5] * 4 + [14] * 9),
    (3, [0] * 14, [1] + [5] * 4 + [14] * 9),
    (7, [0] * 14, [1] + [5] * 4 + [14] * 9),
])
def test_the_table_of_scales(last_scales, first, last):
    ranges = KeyRanges.from_scales((1, 2, 3), last_scales)
    assert (list(ranges.first), list(ranges.last)) == (first, last)


@pytest.mark.parametrize("last_scales", [0, -1])
def test_a_token_sees_its_own_scale_at_least(last_scales):
    with pytest.raises(ValueError, match=f"last_scales is {last_scales}"):
        KeyRanges.from_scales((1, 2), last_scales)


# -------------------------------------------------------------------------------------------------
# The transformer


@torch.no_grad()
@pytest.mark.parametrize("shared_adaln", [False, True])
def test_what_the_class_does_to_each_layer(shared_adaln):
    torch.manual_seed(0)
    model = lively(VAR(config(shared_adaln=shared_adaln)))
    class_BW = torch.randn(3, 32)
    c_BW = class_BW * torch.sigmoid(class_BW)
    layers, head_B2W = model.modulations(class_BW)
    for block, modulation_B6W in zip(model.blocks, layers, strict=True):
        if shared_adaln:
            expected = model.shared_modulation(c_BW).view(3, 6, 32) + block.modulation_offset_6W
        else:
            expected = block.modulation(c_BW).view(3, 6, 32)
        torch.testing.assert_close(modulation_B6W, expected)
    torch.testing.assert_close(head_B2W, model.head_modulation(c_BW).view(3, 2, 32))


def test_a_cache_takes_its_room_once_and_gives_what_is_there():
    cache = LayerCache(14)
    k_BHLD, v_BHLD = torch.randn(2, 2, 3, 14, 8)
    places = set()
    for begin, end in ((0, 1), (1, 5), (5, 14)):
        slots = cache.slots(torch.empty(2, end - begin, 3 * 3 * 8), heads=3)
        slots[0].copy_(k_BHLD[:, :, begin:end])
        slots[1].copy_(v_BHLD[:, :, begin:end])
        seen = cache.so_far()
        assert torch.equal(seen[0], k_BHLD[:, :, :end]) and torch.equal(seen[1], v_BHLD[:, :, :end])
        places.add((seen[0].data_ptr(), seen[1].data_ptr()))
    assert len(places) == 1


@torch.no_grad()
@pytest.mark.parametrize("cfg, rows", [(0.0, 2), (1.0, 4)])
def test_no_guidance_does_not_pay_for_it(cfg, rows):
    model = lively(VAR(config()))
    model.__class__, model.passes = Recorder, []
    model.generate(tokenizer(), torch.tensor([0, 1]), cfg=cfg)
    assert [len(logits_BlV) for logits_BlV in model.passes] == [rows] * 4


@torch.no_grad()
def test_tokens_that_are_known_are_read_by_the_next_scale():
    """What was drawn is forgotten: the logits are those of teaching on the tokens returned.

    And what is known is asked for at every scale, beside what was made of the image by then.
    """
    made = tokenizer()
    model = lively(VAR(config()))
    model.__class__, model.passes = Recorder, []
    labels_B = torch.tensor([0, 2])
    known = known_left(made, 2)
    put = known.put
    asked = {}

    def watched(drawn_Bl, quantizer, f_hat_BCSS, k):
        asked[k] = f_hat_BCSS.clone()
        return put(drawn_Bl, quantizer, f_hat_BCSS, k)

    known.put = watched
    tokens_BL = model.generate(made, labels_B, cfg=0.0, known=known)
    for k, end in enumerate((0, 1, 5, 14)):
        expected = made.quantizer.decode(tokens_BL[:, :end]) if end else made.quantizer.empty(2)
        torch.testing.assert_close(asked[k], expected)
    expected = model(labels_B, made.teacher_inputs(tokens_BL))
    torch.testing.assert_close(torch.cat(model.passes, dim=1), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_draws_follow_their_own_generator_and_the_distribution():
    model = VAR(config(scales=(1,)))
    logits_BlV = torch.tensor([0.0, 1.0, 2.0]).expand(1, 3000, 3)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(drawn))
        generator = torch.Generator().manual_seed(seed)
        drawn.append(model.draw(logits_BlV, 0, 0.0, 0, 1.0, generator)[0])
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    shares = drawn[0].bincount(minlength=3) / 3000
    torch.testing.assert_close(shares, logits_BlV[0, 0].softmax(0), rtol=0, atol=0.04)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drawing_changes_nothing_that_it_was_given(dtype):
    generator = torch.Generator().manual_seed(0)
    given = [torch.rand(2, 3, 9, generator=generator).add(0.1).to(dtype) for _ in range(3)]
    before = [tensor.clone() for tensor in given]
    kernels.sample_tokens_torch(given[0], given[1], 1.5, 3, 0.7, given[2])
    assert all(map(torch.equal, given, before))


@pytest.mark.skipif(not kernels.HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("W", [24, 100])
def test_a_row_narrower_than_its_tile_and_far_from_zero_is_normalised(W, monkeypatch):
    monkeypatch.setattr(kernels, "BACKEND", "triton")
    generator = torch.Generator().manual_seed(0)
    x_BLW, h_BLW = torch.randn(2, 2, 3, W, generator=generator)
    gate_BW, scale_BW, shift_BW = torch.randn(3, 2, W, generator=generator)
    given = [part.to(DEVICE) for part in (x_BLW + 100, h_BLW, gate_BW, scale_BW, shift_BW)]
    sum_BLW, y_BLW = kernels.adaln(*given)
    expected = (x_BLW + 100).double() + gate_BW[:, None] * h_BLW
    torch.testing.assert_close(sum_BLW.cpu().double(), expected, rtol=1e-5, atol=1e-5)
    normed_BLW = F.layer_norm(expected, (W,), eps=1e-6)
    expected = normed_BLW * (1 + scale_BW[:, None]) + shift_BW[:, None]
    torch.testing.assert_close(y_BLW.cpu().double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not kernels.HAS_TRITON, reason="Triton is not installed")
def test_tiles_before_the_range_are_not_visited():
    """A weight of 0 times a value there would be NaN."""
    ranges = KeyRanges.from_scales((4, 4, 4), last_scales=1)
    q, k, v = torch.randn(3, 1, 2, 48, 16, device=DEVICE)
    v[:, :, :16] = torch.nan
    with attention_tiles((16, 16)):
        o = kernels.block_attention_triton(q, k, v, ranges, 1.0)
    assert o[:, :, :16].isnan().all() and o[:, :, 16:].isfinite().all()


# -------------------------------------------------------------------------------------------------
# In-painting


def test_a_hole_is_filled_from_its_border():
    """Ring by ring, each place with the average of its neighbours that are known by then."""
    images = torch.arange(25.0).view(1, 1, 5, 5) + 1
    known_HW = torch.ones(5, 5)
    known_HW[1:4, 1:4] = 0
    filled = sample.fill_holes(images, known_HW)[0, 0]
    pixels = images[0, 0]
    assert torch.equal(filled[known_HW > 0], pixels[known_HW > 0])
    corner = (pixels[0, :3].sum() + pixels[1:3, 0].sum()) / 5
    edge = pixels[0, 1:4].mean()
    torch.testing.assert_close([filled[1, 1], filled[1, 2]], [corner, edge])
    ring = torch.cat([filled[1, 1:4], filled[3, 1:4], filled[2, 1:4:2]])
    torch.testing.assert_close(filled[2, 2], ring.mean())


def test_filling_reads_nothing_in_the_hole_and_reaches_its_middle():
    torch.manual_seed(0)
    images = torch.rand(2, 3, 16, 16) + 1
    known_HW = torch.zeros(16, 16)
    known_HW[:, :2] = 1
    filled = sample.fill_holes(images, known_HW)
    assert filled.min() >= 1 and filled.max() <= 2
    assert torch.equal(filled[..., :2], images[..., :2])
    other = torch.where(known_HW > 0, images, -7.0)
    assert torch.equal(sample.fill_holes(other, known_HW), filled)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_all_or_nothing_known_ends(share):
    images = torch.ones(1, 3, 4, 4)
    assert torch.equal(sample.fill_holes(images, torch.full((4, 4), share)), share * images)
