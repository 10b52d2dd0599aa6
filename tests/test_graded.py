"""What the assignments promise and no other test holds a solution to: small cases, worked out."""
import contextlib
from dataclasses import replace

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from test_kernels import DEVICE, LargestTensor, attention_tiles, double, needs_triton
from test_tokenizer import in_numpy, quantizer, tokenizer
from test_var import Recorder, config, known_left, lively
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels
import sample
from kernels import KeyRanges
from var import VAR, Block, LayerCache

META = torch.device("meta")


class OneDevice(TorchDispatchMode):
    """Refuses to compute with the numbers of two devices. (A convolution takes "meta" weights.)"""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.ndim]
        assert len({x.device for x in given}) < 2, f"{function} is given numbers of two devices"
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def elsewhere():
    """A stand-in for a GPU: what is given is on the CPU, what is made anew without naming a device
    is not."""
    with META, OneDevice():
        yield

# -------------------------------------------------------------------------------------------------
# The tokenizer


@torch.no_grad()
def test_the_running_sum_is_computed_in_fp32_under_autocast():
    made = quantizer().float()
    tokens_Bl = torch.randint(8, (3, 4))
    f_hat_BCSS = torch.randn(3, 2, 4, 4)
    expected = made.accumulate(f_hat_BCSS, tokens_Bl, 1)
    assert not torch.equal(expected, f_hat_BCSS)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made.accumulate(f_hat_BCSS, tokens_Bl, 1), expected)


def test_gradients_pass_through_a_sum_to_all_that_is_in_it():
    """To f_hat as they are; to codes and phi as slopes are measured."""
    made = quantizer()
    f_hat_BCSS = torch.randn(3, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    tokens_Bl = torch.randint(8, (3, 4))
    weight = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    inputs = [f_hat_BCSS, made.codebook_VC, made.phis[made.phi_of_scale[1]].bias]
    sum_BCSS = made.accumulate(f_hat_BCSS, tokens_Bl, 1)
    for given, found in zip(inputs, torch.autograd.grad(sum_BCSS, inputs, weight)):
        def weighed(x):
            with torch.no_grad():
                before = given.clone()
                given.copy_(torch.from_numpy(x))
                result = (made.accumulate(f_hat_BCSS, tokens_Bl, 1) * weight).sum().item()
                given.copy_(before)
                return result
        expected = torch.from_numpy(reference.slopes(weighed, double(given)))
        torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_what_the_quantizer_makes_is_where_its_inputs_are():
    made = quantizer().train()
    f_BCSS = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    with elsewhere():
        tokens_BL = made.encode(f_BCSS)
        found = [tokens_BL, made.decode(tokens_BL), made.teacher_inputs(tokens_BL), *made(f_BCSS)]
    assert {x.device.type for x in found} == {"cpu"}
    assert [x.dtype for x in found] == [torch.int64] + 4 * [torch.float64]
    maps = [x.numpy() for x in made.split(tokens_BL)]
    expected = torch.from_numpy(reference.running_latents(maps, **in_numpy(made))[-1])
    torch.testing.assert_close(found[1], expected)
    torch.testing.assert_close(found[3], expected)


@torch.no_grad()
def test_each_map_is_compared_and_added_once(monkeypatch):
    made = quantizer().train()
    vectors, maps = [], []
    nearest_code = kernels.nearest_code
    monkeypatch.setattr("tokenizer.nearest_code",
                        lambda x_NC, *rest: vectors.append(len(x_NC)) or nearest_code(x_NC, *rest))
    for phi in made.phis:
        phi.register_forward_hook(lambda *_: maps.append(1))
    f_BCSS = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    tokens_BL = made.encode(f_BCSS)
    for run, given, compared, added in (
            (made.encode, f_BCSS, 63, 3), (made, f_BCSS, 63, 3), (made.decode, tokens_BL, 0, 3),
            (made.teacher_inputs, tokens_BL, 0, 2)):
        vectors.clear()
        maps.clear()
        run(given)
        assert sum(vectors) == compared and added - 1 <= len(maps) <= added


def test_one_image_at_one_scale_is_still_a_batch():
    made = quantizer(scales=(1,)).train()
    f_BCSS = torch.randn(1, 2, 1, 1, dtype=torch.float64)
    straight_BCSS, _ = made(f_BCSS)
    found = [made.last_tokens_BL, *made.last_residuals, made.encode(f_BCSS)]
    assert [list(x.shape) for x in found] == [[1, 1], [1, 1, 2], [1, 1]]
    expected = reference.running_latents([found[0].numpy()], **in_numpy(made))[0]
    for x_BCSS in (straight_BCSS.detach(), made.decode(found[0])):
        torch.testing.assert_close(x_BCSS, torch.from_numpy(expected))


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
    f_hat_BCSS = made.initial(2)
    for k, tokens_Bl in enumerate(made.split(tokens_BL)):
        f_hat_BCSS = made.accumulate(f_hat_BCSS, tokens_Bl, k)
    assert torch.equal(made.decode(tokens_BL), f_hat_BCSS) and f_hat_BCSS.any()


@torch.no_grad()
def test_neighbouring_scales_share_a_phi():
    made = quantizer(scales=(1, 2, 3, 4), phis=2)
    for k, used in enumerate((0, 0, 1, 1)):
        tokens_Bl = torch.randint(8, (2, (k + 1)**2))
        before = made.accumulate(made.initial(2), tokens_Bl, k)
        made.phis[1 - used].weight.normal_()
        assert torch.equal(made.accumulate(made.initial(2), tokens_Bl, k), before)
        made.phis[used].weight.normal_()
        assert not torch.equal(made.accumulate(made.initial(2), tokens_Bl, k), before)


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
    with pytest.raises(ValueError, match=str(last_scales)):
        KeyRanges.from_scales((1, 2), last_scales)


def test_tables_are_small_int32_and_where_they_are_asked_for():
    ranges = KeyRanges.from_scales((1, 2, 3, 4, 5, 6))
    with LargestTensor() as largest:
        tables = kernels.transposed_table(ranges, torch.device("cpu"))
    assert largest.numel <= 2 * len(ranges) and [x.dtype for x in tables] == 2 * [torch.int32]
    tables = [*kernels.transposed_table(ranges, META), kernels.mask_in_sight(ranges, META)]
    assert [x.device for x in tables] == 3 * [META]
    assert kernels.mask_in_sight(ranges.rows(5, 14), META) is None


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


def test_gradients_pass_through_a_layer_and_what_the_class_does_to_it():
    """Those of the formula, by autograd: to the stream, the class and all weights."""
    torch.manual_seed(0)
    model = lively(VAR(config(depth=1)))
    block = model.blocks[0]
    x_BLW, h_BLW, class_BW = torch.randn(2, 30, 32), torch.randn(2, 30, 32), torch.randn(2, 32)
    inputs = [x.requires_grad_() for x in (x_BLW, h_BLW, class_BW)]
    inputs += [*block.parameters(), *model.head_modulation.parameters()]
    (m_B6W,), head_B2W = model.modulations(class_BW)
    x, h, gate_BW = block((x_BLW, h_BLW, torch.ones(2, 32)), m_B6W, model.ranges, None)
    found = torch.autograd.grad((x + gate_BW[:, None] * h).square().sum() + head_B2W.sum(), inputs)
    c_BW = class_BW * class_BW.sigmoid()
    m = block.modulation(c_BW).view(2, 6, 1, 32).unbind(1)

    def normed(x):
        return F.layer_norm(x, (32,), eps=1e-6)

    x = x_BLW + h_BLW
    x = x + m[0] * block.attention(normed(x) * (1 + m[2]) + m[4], model.ranges, None)
    x = x + m[1] * block.mlp(normed(x) * (1 + m[3]) + m[5])
    loss = x.square().sum() + model.head_modulation(c_BW).sum()
    torch.testing.assert_close(found, torch.autograd.grad(loss, inputs), rtol=1e-3, atol=1e-2)


def test_a_skipped_branch_has_no_gradient_and_others_have_more():
    torch.manual_seed(0)
    gate_BW = torch.full((200, 4), 0.6, requires_grad=True)
    with elsewhere():
        made = Block(config(), drop_path=0.25).to_empty(device="cpu")
        made.survival.fill_(0.75)
        skipping_BW = made.skip(gate_BW)
    skipping_BW.sum().backward()
    torch.testing.assert_close(gate_BW.grad, skipping_BW.detach() / 0.6)
    runs = [made.skip(gate_BW.detach())[:, 0] > 0 for _ in range(2)]
    assert not torch.equal(*runs)


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
@pytest.mark.parametrize("cfg, images", [(0.0, 2), (1.0, 4)])
def test_each_token_passes_each_layer_once(cfg, images):
    """The cache is there to save the earlier scales."""
    model, made, passed = lively(VAR(config())), tokenizer(), []
    for block in model.blocks:
        block.mlp[0].register_forward_hook(
            lambda module, given, out: passed.append(out.shape[:-1].numel()))
    model.generate(made, torch.tensor([0, 2]), cfg=cfg)
    assert sum(passed) == 2 * images * 30


@torch.no_grad()
def test_what_is_generated_is_where_the_labels_are():
    model, made, labels_B = lively(VAR(config())), tokenizer(), torch.tensor([0, 2])
    known = known_left(made, 2)
    model.generate(made, labels_B, known=known)     # makes the tables of the mask
    with elsewhere():
        tokens_BL = model.generate(made, labels_B, known=known)
    assert tokens_BL.device.type == "cpu" and tokens_BL.dtype == torch.int64
    assert len(tokens_BL.unique()) > 1


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
        expected = made.quantizer.decode(tokens_BL[:, :end]) if end else made.quantizer.initial(2)
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
    images_Bl = model.draw(logits_BlV[:, :40].expand(75, 40, 3), 0, 0.0, 0, 1.0, generator)
    assert len(images_Bl.unique(dim=0)) == 75   # each has noise of its own


@pytest.mark.parametrize("top_k, top_p", [(0, 0.5), (5, 0.9), (9, 1.0)])
def test_each_place_has_a_threshold_of_its_own(top_k, top_p):
    """Beside places whose logits lie lower, or nearer to each other, it draws as it does alone."""
    generator = torch.Generator().manual_seed(0)
    cond_BlV = torch.randn(2, 24, 64, generator=generator)
    cond_BlV *= torch.tensor([0.1, 3.0, 30.0]).repeat(8)[:, None]
    cond_BlV[1] -= 80
    noise_BlV = torch.empty(2, 24, 64).exponential_(generator=generator)
    together_Bl = kernels.sample_tokens_torch(cond_BlV, None, 0.0, top_k, top_p, noise_BlV)
    for b, i in np.ndindex(2, 24):
        place = slice(b, b + 1), slice(i, i + 1)
        alone = kernels.sample_tokens_torch(
            cond_BlV[place], None, 0.0, top_k, top_p, noise_BlV[place])
        assert together_Bl[b, i] == alone.item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drawing_changes_nothing_that_it_was_given(dtype):
    generator = torch.Generator().manual_seed(0)
    given = [torch.rand(2, 3, 9, generator=generator).add(0.1).to(dtype) for _ in range(3)]
    before = [tensor.clone() for tensor in given]
    kernels.sample_tokens_torch(given[0], given[1], 1.5, 3, 0.7, given[2])
    assert all(map(torch.equal, given, before))


@pytest.mark.parametrize("top_k, top_p", [(-1, 1.0), (-1, 0.7), (3, 1.0), (12, 1.0)])
def test_a_draw_is_int64_and_where_the_logits_are(top_k, top_p):
    generator = torch.Generator().manual_seed(0)
    cond_BlV, uncond_BlV, noise_BlV = torch.rand(3, 2, 3, 9, generator=generator)
    with elsewhere():
        tokens = [kernels.sample_tokens_torch(cond_BlV, other, 1.5, top_k, top_p, noise_BlV)
                  for other in (uncond_BlV, None)]
    assert [(x.dtype, x.device.type, x.shape) for x in tokens] == 2 * [(torch.int64, "cpu", (2, 3))]
    if top_p == 1 and top_k != 3:      # no limit
        logits = 2.5 * cond_BlV - 1.5 * uncond_BlV
        assert torch.equal(tokens[0], (logits - noise_BlV.log()).argmax(dim=-1))


@needs_triton
def test_the_norm_is_of_the_sum_as_it_is_stored(monkeypatch):
    monkeypatch.setattr(kernels, "BACKEND", "triton")
    x_BLW, h_BLW = torch.randn(2, 1, 3, 24, device=DEVICE)
    gate_BW, scale_BW, shift_BW = torch.randn(3, 1, 24, device=DEVICE)
    sum_BLW, y_BLW = kernels.adaln_triton(
        x_BLW.bfloat16(), h_BLW, gate_BW, scale_BW, shift_BW, torch.float32)
    normed_BLW = F.layer_norm(sum_BLW.float(), (24,), eps=1e-6)
    torch.testing.assert_close(y_BLW, normed_BLW * (1 + scale_BW) + shift_BW, rtol=1e-4, atol=1e-4)


@needs_triton
@pytest.mark.parametrize("W", [24, 100])
def test_a_row_narrower_than_its_tile_and_far_from_zero_is_normalised(W, monkeypatch):
    monkeypatch.setattr(kernels, "BACKEND", "triton")
    generator = torch.Generator().manual_seed(0)
    x_BLW, h_BLW = torch.randn(2, 2, 3, W, generator=generator)
    x_BLW[0] += 100
    x_BLW[1] /= 1000   # and one of numbers beside which 1e-6 is not small
    h_BLW[1] /= 1000
    gate_BW, scale_BW, shift_BW = torch.randn(3, 2, W, generator=generator)
    given = [part.to(DEVICE) for part in (x_BLW, h_BLW, gate_BW, scale_BW, shift_BW)]
    sum_BLW, y_BLW = kernels.adaln(*given)
    expected = x_BLW.double() + gate_BW[:, None] * h_BLW
    torch.testing.assert_close(sum_BLW.cpu().double(), expected, rtol=1e-5, atol=1e-5)
    normed_BLW = F.layer_norm(expected, (W,), eps=1e-6)
    expected = normed_BLW * (1 + scale_BW[:, None]) + shift_BW[:, None]
    torch.testing.assert_close(y_BLW.cpu().double(), expected, rtol=1e-4, atol=1e-4)


@needs_triton
def test_tiles_before_the_range_are_not_visited():
    """A weight of 0 times a value there would be NaN."""
    ranges = KeyRanges.from_scales((4, 4, 4), last_scales=1)
    q, k, v = torch.randn(3, 1, 2, 48, 16, device=DEVICE)
    v[:, :, :16] = torch.nan
    with attention_tiles((16, 16)):
        o = kernels.block_attention_triton(q, k, v, ranges, 1.0)
    assert o[:, :, :16].isnan().all() and o[:, :, 16:].isfinite().all()


@needs_triton
@pytest.mark.skipif(DEVICE == "cuda", reason="what a compiled kernel calls cannot be counted")
def test_tiles_that_all_see_are_not_masked(monkeypatch):
    masked = []
    seen_by = kernels.seen_by
    monkeypatch.setattr(kernels, "seen_by", lambda *given: masked.append(given) or seen_by(*given))
    for scales, count in (((4, 4, 4), 0), ((4, 1, 4), 3)):   # of the second, whose tiles are cut
        ranges = KeyRanges.from_scales(scales)
        q, k, v = torch.randn(3, 1, 1, len(ranges), 16)
        masked.clear()
        with attention_tiles((16, 16)):
            kernels.block_attention_triton(q, k, v, ranges, 1.0)
        assert len(masked) == count


@needs_triton
def test_the_backward_kernels_visit_no_tile_out_of_range_either():
    ranges = KeyRanges.from_scales((4, 4, 4), last_scales=1)
    q, k, v, do = torch.randn(4, 1, 2, 48, 16, device=DEVICE)
    v[:, :, 16:32], do[:, :, 16:32] = torch.nan, torch.nan
    for x in (q, k, v):
        x.requires_grad_()
    with attention_tiles((16, 16)):
        kernels.block_attention_triton(q, k, v, ranges, 1.0).backward(do)
    for x in (q, k, v):
        assert x.grad[:, :, :16].isfinite().all() and x.grad[:, :, 32:].isfinite().all()


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


def test_each_channel_is_filled_by_itself_and_nothing_lies_beyond_the_edge():
    images = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    known_HW = torch.zeros(5, 7)
    known_HW[1:4, 1:3] = known_HW[0, 5] = 1
    expected = (images * known_HW).numpy()
    known = known_HW.numpy() > 0
    while not known.all():
        before, seen = expected.copy(), known.copy()
        for y, x in np.argwhere(~seen):
            around = slice(max(y - 1, 0), y + 2), slice(max(x - 1, 0), x + 2)
            if seen[around].any():
                expected[..., y, x] = before[(..., *around)][..., seen[around]].mean(axis=-1)
                known[y, x] = True
    filled = sample.fill_holes(images, known_HW)
    np.testing.assert_allclose(filled.numpy(), expected, rtol=1e-5)


def test_filling_reads_nothing_in_the_hole_and_reaches_its_middle():
    torch.manual_seed(0)
    images = torch.rand(2, 3, 16, 80) + 1
    known_HW = torch.zeros(16, 80)
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


@torch.no_grad()
def test_what_is_put_is_where_the_drawn_tokens_are():
    made = tokenizer()
    known = known_left(made, 2)
    with elsewhere():
        found = [known.put(torch.zeros(2, 9, dtype=torch.int64, device="cpu"), made.quantizer,
                           made.quantizer.initial(2), 2), known.mask(made.quantizer, 2),
                 sample.fill_holes(known.where_B1SS, known.where_B1SS[0, 0])]
    assert [x.dtype for x in found] == [torch.int64, torch.bool, torch.float32]
    assert {x.device.type for x in found} == {"cpu"}


def test_free_coarse_maps_are_known_where_that_share_is():
    made = tokenizer(scales=(1, 2, 4, 8))   # of which three columns of eight are known
    for share, twos, fours in ((0.5, [True, False], [True, True, False, False]),
                               (0.8, [False, False], [True, False, False, False])):
        known = known_left(made, 3, known_from=share)
        for k, columns in enumerate(([False], twos, fours, 3 * [True] + 5 * [False])):
            known_Bl = known.mask(made.quantizer, k)
            assert known_Bl[0].view(len(columns), -1)[0].tolist() == columns


def test_each_image_has_a_known_part_of_its_own():
    made = tokenizer(scales=(1, 2, 4, 8))
    left = known_left(made, 3)
    right = replace(left, where_B1SS=left.where_B1SS.flip(-1))
    nothing = replace(left, where_B1SS=torch.zeros_like(left.where_B1SS))
    each = (nothing, left, right)
    together = replace(left, where_B1SS=torch.cat([known.where_B1SS[:1] for known in each]))
    for k in range(4):
        masks = [known.mask(made.quantizer, k)[:1] for known in each]
        assert torch.equal(together.mask(made.quantizer, k), torch.cat(masks))
