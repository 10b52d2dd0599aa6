"""The transformer: nothing later moves an earlier logit, generation computes what teaching does, and what is known of
an image stays."""
import itertools
import math

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from test_kernels import DEVICE, needs_triton
from test_tokenizer import Operations, images, tokenizer

import kernels
from sample import Known
from tokenizer import Tokenizer
from var import VAR, Attention, Block, LayerCache, VARConfig

SCALES = (1, 2, 3, 4)
ENDS = [0, 1, 5, 14, 30]


def config(**changes) -> VARConfig:
    return VARConfig(**{**dict(scales=SCALES, vocabulary=32, code_channels=4, classes=3, depth=2, width=32, heads=2,
                               shared_adaln=False, normalise_qk=True, label_dropout=0.1, drop_path=0.1,
                               last_scales=None), **changes})


def lively(model: VAR) -> VAR:
    """With gates and a head of ordinary size: as initialised, a block does next to nothing, and tests see nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


VARIANTS = [dict(), dict(shared_adaln=True), dict(normalise_qk=False), dict(last_scales=1), dict(last_scales=2)]


@pytest.fixture(params=VARIANTS, ids=str)
def model(request) -> VAR:
    torch.manual_seed(0)
    return lively(VAR(config(**request.param)))


@torch.no_grad()
def test_later_scales_do_not_move_earlier_logits(model):
    labels_B, inputs = torch.tensor([0, 2]), torch.randn(2, 29, 4)
    before = model(labels_B, inputs)
    for k in range(1, 4):
        changed = inputs.clone()
        changed[:, ENDS[k] - 1:] += 1   # the inputs of scale k and on
        moved_L = (model(labels_B, changed) - before).abs().amax(dim=(0, 2))
        assert moved_L[:ENDS[k]].max() == 0
        assert moved_L[ENDS[k]:].min() > 1e-4   # every token of scale k and on sees a changed input


@torch.no_grad()
def test_what_a_token_sees(model):
    """The whole set of inputs that move the last scale: all so far, or those of its last scales."""
    labels_B, inputs = torch.tensor([1]), torch.randn(1, 29, 4)
    before, seen = model(labels_B, inputs), []
    for i in range(29):
        changed = inputs.clone()
        changed[:, i] += 1
        seen.append(bool((model(labels_B, changed) - before)[0, ENDS[3]:].abs().max() > 1e-5))
    reach = 4 if model.config.last_scales is None else 1 + (model.config.last_scales - 1) * model.config.depth
    assert seen == [i + 1 >= ENDS[max(0, 4 - reach)] for i in range(29)]


class Recorder(VAR):
    """Keeps the logits of every pass of a generation."""
    def draw(self, logits_BlV, *arguments):
        self.passes.append(logits_BlV)
        return super().draw(logits_BlV, *arguments)


@torch.no_grad()
@pytest.mark.parametrize("cfg", [0.0, 2.0])
def test_cached_generation_equals_the_masked_forward(model, cfg):
    """Teacher forcing on the generated tokens computes the logits that they were drawn from, at every scale."""
    made, labels_B = tokenizer(), torch.tensor([0, 2])
    model.__class__, model.passes = Recorder, []
    tokens_BL = model.generate(made, labels_B, cfg=cfg, generator=torch.Generator().manual_seed(0))
    drawn_from = torch.cat(model.passes, dim=1)
    if cfg:
        labels_B, tokens_BL = torch.cat([labels_B, torch.full((2,), 3)]), tokens_BL.repeat(2, 1)
    torch.testing.assert_close(drawn_from, model(labels_B, made.teacher_inputs(tokens_BL)), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_guidance(model):
    made, labels_B = tokenizer(), torch.tensor([0, 1, 2])
    draw = lambda **how: model.generate(made, labels_B, generator=torch.Generator().manual_seed(5), **how)
    plain = draw(cfg=0.0)
    assert torch.equal(plain, draw(cfg=1e-6))            # a guidance of nothing is no guidance
    assert not torch.equal(plain, draw(cfg=5.0))
    assert torch.equal(plain[:, :1], draw(cfg=5.0)[:, :1])   # it grows from 0 at the first scale
    assert torch.equal(plain, draw(cfg=0.0))             # the same seed, the same tokens
    inputs = made.teacher_inputs(plain)
    null = model(torch.full((3,), model.config.classes), inputs)
    assert (null - model(labels_B, inputs)).abs().max() > 1e-3


@torch.no_grad()
def test_one_scale_alone_generates():
    made = tokenizer(scales=(1,))
    tokens_BL = lively(VAR(config(scales=(1,)))).generate(made, torch.tensor([0, 1]), cfg=3.0)
    assert tokens_BL.shape == (2, 1)


def test_an_interrupted_generation_leaves_nothing_behind(model):
    made, labels_B = tokenizer(), torch.tensor([0])
    before = model.generate(made, labels_B, generator=torch.Generator().manual_seed(0))
    broken = Tokenizer(made.config)
    broken.quantizer.read = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        model.generate(broken, labels_B)
    assert torch.equal(before, model.generate(made, labels_B, generator=torch.Generator().manual_seed(0)))


def test_label_dropout_and_stochastic_depth_stop_in_eval():
    torch.manual_seed(0)
    model = lively(VAR(config(label_dropout=1.0, drop_path=0.5)))
    inputs = torch.randn(4, 29, 4)
    zero, null = torch.zeros(4, dtype=torch.int64), torch.full((4,), 3)
    assert torch.equal(model(zero, inputs), model(zero, inputs))
    model.train()
    torch.manual_seed(1)
    dropped = model(zero, inputs)
    torch.manual_seed(1)
    assert torch.equal(dropped, model(null, inputs))     # all labels became the null class
    torch.manual_seed(2)
    assert not torch.equal(dropped, model(zero, inputs))     # other layers were skipped


def test_dropped_labels_become_the_null_class():
    torch.manual_seed(0)
    model, labels_B = VAR(config(label_dropout=0.25)), torch.arange(3).repeat(1000)
    after_B = model.drop_labels(labels_B)
    dropped_B = after_B == 3
    assert torch.equal(after_B[~dropped_B], labels_B[~dropped_B])
    assert 0.22 < dropped_B.float().mean() < 0.28
    assert torch.equal(model.eval().drop_labels(labels_B), labels_B)


def test_the_first_loss_is_ln_v():
    torch.manual_seed(0)
    model = VAR(config(vocabulary=512))
    loss = F.cross_entropy(model(torch.tensor([0, 1]), torch.randn(2, 29, 4)).flatten(0, 1), torch.randint(512, (60,)))
    assert abs(loss.item() - math.log(512)) < 0.05


@needs_triton
def test_both_backends_give_the_same_loss_and_gradients(monkeypatch):
    torch.manual_seed(0)
    scales = (1, 2)   # small, for the sake of Triton's interpreter
    model = lively(VAR(config(scales=scales, depth=1))).to(DEVICE)
    made = tokenizer(scales=scales)
    tokens_BL = made.encode(images(made, 2))
    inputs = made.teacher_inputs(tokens_BL).to(DEVICE)
    results = {}
    for backend in ("torch", "triton"):
        monkeypatch.setattr(kernels, "BACKEND", backend)
        model.zero_grad()
        logits_BLV = model(torch.tensor([0, 2], device=DEVICE), inputs)
        loss = F.cross_entropy(logits_BLV.flatten(0, 1), tokens_BL.flatten().to(DEVICE))
        loss.backward()
        results[backend] = [loss.detach(), *(p.grad for p in model.parameters())]
    for ours, twin in zip(results["triton"], results["torch"]):
        torch.testing.assert_close(ours, twin, rtol=1e-3, atol=1e-5)


def test_widths_that_heads_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="not divisible by 3 heads"):
        config(heads=3)


# -----------------------------------------------------------------------------
# The parts of a layer


@torch.no_grad()
@pytest.mark.parametrize("normalise_qk", [True, False])
def test_attention_is_numpys(normalise_qk):
    """Scores of unit queries and keys times the learned scale, or of any times 0.25 / sqrt(D); no bias on keys."""
    torch.manual_seed(0)
    attention = Attention(config(normalise_qk=normalise_qk)).double()
    for parameter in attention.parameters():
        parameter.normal_()
    if normalise_qk:
        attention.log_scale_H11[:] = torch.tensor([1.0, 7.0]).view(2, 1, 1)   # the second is above ln 100
    x_BLW = torch.randn(2, 30, 32, dtype=torch.float64)
    ranges = kernels.KeyRanges.from_scales(SCALES)
    q, k, v = (x_BLW.numpy() @ attention.qkv.weight.numpy().T).reshape(2, 30, 3, 2, 16).transpose(2, 0, 3, 1, 4)
    q, v = (x + bias.numpy().reshape(2, 1, 16) for x, bias in ((q, attention.q_bias), (v, attention.v_bias)))
    scale = 0.25 / 4
    if normalise_qk:
        q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
        q, scale = q * np.array([math.e, 100.0]).reshape(2, 1, 1), 1.0
    o = reference.attention(q, k, v, ranges.first, ranges.last, scale, np.zeros_like(q))[0]["o"]
    expected = o.transpose(0, 2, 1, 3).reshape(2, 30, 32) @ attention.out.weight.numpy().T + attention.out.bias.numpy()
    np.testing.assert_allclose(attention(x_BLW, ranges, None).numpy(), expected, rtol=1e-5, atol=1e-4)   # unit in fp32


def test_stochastic_depth_skips_whole_images_and_scales_the_others():
    torch.manual_seed(0)
    block = Block(config(), drop_path=0.25)
    gate_BW = torch.full((2000, 32), 0.6)
    skipping_BW = block.skip(gate_BW)
    assert torch.equal(skipping_BW, skipping_BW[:, :1].expand_as(gate_BW))   # all of an image alike
    skipped_B = skipping_BW[:, 0] == 0
    assert torch.allclose(skipping_BW[~skipped_B], torch.tensor(0.6 / 0.75))
    assert 0.22 < skipped_B.float().mean() < 0.28
    assert torch.equal(block.eval().skip(gate_BW), gate_BW)
    rates = [1 - block.survival.item() for block in VAR(config(depth=3, drop_path=0.3)).blocks]
    assert rates == pytest.approx([0, 0.15, 0.3])


def test_a_block_is_what_it_says(model):
    """Attention, then the perceptron, each after an AdaLN and scaled by a gate; six vectors, in this order."""
    block, ranges = model.blocks[0], model.ranges
    torch.manual_seed(0)
    stream, m = (torch.randn(2, 30, 32), torch.randn(2, 30, 32), torch.randn(2, 32)), torch.randn(2, 6, 32)
    x_BLW = stream[0] + stream[2][:, None] * stream[1]   # the branch of the layer before is still to be added
    norm = lambda x_BLW: F.layer_norm(x_BLW, (32,), eps=1e-6)
    h_BLW = x_BLW + m[:, None, 0] * block.attention(norm(x_BLW) * (1 + m[:, None, 2]) + m[:, None, 4], ranges, None)
    expected = h_BLW + m[:, None, 1] * block.mlp(norm(h_BLW) * (1 + m[:, None, 3]) + m[:, None, 5])
    x_BLW, branch_BLW, gate_BW = block(stream, m, ranges, None)
    torch.testing.assert_close(x_BLW + gate_BW[:, None] * branch_BLW, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shared_adaln", [True, False])
def test_sizes_at_the_start(shared_adaln):
    torch.manual_seed(0)
    W, depth = 64, 8
    model = VAR(config(width=W, depth=depth, vocabulary=256, classes=50, shared_adaln=shared_adaln))
    std, block = math.sqrt(1 / (3 * W)), model.blocks[3]
    expected = {
        model.class_embedding.weight: std, model.code_embedding.weight: std, model.position_1LW: std,
        model.start_position_11W: std, model.level_embedding.weight: std,
        block.attention.qkv.weight: std, block.mlp[0].weight: std,
        block.attention.out.weight: std / 4, block.mlp[2].weight: std / 4,   # 16 branches
        model.head_modulation.weight: std / 2, model.head.weight: std * 0.02,
    }
    if shared_adaln:
        expected[model.shared_modulation.weight] = std
        gates, others = block.modulation_offset_6W.split((2, 4))
        expected |= {gates: 1e-5 * math.sqrt(1 / W), others: 0.5 * math.sqrt(1 / W)}
    else:
        gates, others = block.modulation.weight.view(6, W, W).split((2, 4))
        expected |= {gates: 1e-5 * std, others: 0.5 * std}
    for tensor, size in expected.items():
        assert tensor.std().item() == pytest.approx(size, rel=0.15)
    assert model.class_embedding.weight.shape == (51, W)   # the last is the null class
    assert block.attention.log_scale_H11.exp().flatten().tolist() == pytest.approx([4, 4])
    assert all(part.bias.abs().max() == 0 for part in model.modules() if getattr(part, "bias", None) is not None)


# -----------------------------------------------------------------------------
# Generation


@torch.no_grad()
@pytest.mark.parametrize("scales, guidances", [((1, 2, 3, 4), [0, 2, 4, 6]), ((1,), [0]), ((1, 4), [0, 6])])
def test_guidance_grows_from_nothing_at_the_first_scale_to_cfg_at_the_last(monkeypatch, scales, guidances):
    torch.manual_seed(0)
    model, asked = lively(VAR(config(scales=scales))), []

    def record(cond_BlV, uncond_BlV, guidance, top_k, top_p, noise_BlV):
        asked.append(guidance)
        assert (top_k, top_p) == (7, 0.8) and cond_BlV.shape == uncond_BlV.shape == noise_BlV.shape
        assert not torch.equal(cond_BlV, uncond_BlV)
        return kernels.sample_tokens(cond_BlV, uncond_BlV, guidance, top_k, top_p, noise_BlV)

    monkeypatch.setattr("var.sample_tokens", record)
    model.generate(tokenizer(scales=scales), torch.tensor([0, 1]), cfg=6.0, top_k=7, top_p=0.8)
    assert asked == pytest.approx(guidances)
    asked.clear()
    model.generate(tokenizer(scales=scales), torch.tensor([0, 1]), cfg=6.0, top_k=7, top_p=0.8, growth=2.0)
    assert asked == pytest.approx([guidance**2 / 6 for guidance in guidances])


def test_top_p_falls_from_the_first_scale_to_the_last(monkeypatch):
    model, asked = lively(VAR(config(scales=(1, 2, 3)))), []

    def noted(cond_BlV, *how):
        assert not cond_BlV.requires_grad   # nothing is kept for a backward pass
        asked.append(how[3])
        return kernels.sample_tokens(cond_BlV, *how)

    monkeypatch.setattr("var.sample_tokens", noted)
    for top_p, growth in ((0.7, 2.0), ((1.0, 0.6), 1.0), ((1.0, 0.5), 2.0)):
        model.generate(tokenizer(scales=(1, 2, 3)), torch.tensor([0]), top_p=top_p, growth=growth)
    assert asked == [0.7] * 3 + [1.0, 0.8, 0.6] + [1.0, 0.875, 0.5]


@torch.no_grad()
@given(cfg=st.sampled_from([None, 0.0, 0.7, 4.0]), share=st.sampled_from([0.0, 0.3, 1.0]), s=st.integers(1, 4),
       seed=st.integers(0, 99), half=st.booleans())
def test_smoothed_codes_are_numpys(cfg, share, s, seed, half):
    """In fp32, under autocast too."""
    torch.manual_seed(seed)
    logits_BlV = 2 * torch.randn(2 if cfg is None else 4, s * s, 32)
    tokens_Bl = torch.randint(32, (2, s * s))
    codebook_VC = torch.randn(32, 4)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        found = VAR.smoothed(tokens_Bl, logits_BlV, cfg or 0.0, share, codebook_VC)
    guided = logits_BlV.double().numpy()
    if cfg is not None:
        guided = (1 + cfg) * guided[:2] - cfg * guided[2:]
    expected = reference.smoothed(tokens_Bl.numpy(), guided, codebook_VC.double().numpy(), share)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("cfg, smooth", [(0.0, 1.0), (1.5, 0.7)])
def test_what_is_smoothed_is_read_and_is_the_latent(cfg, smooth):
    """Teacher forcing on smoothed latents computes the logits that were drawn from."""
    torch.manual_seed(0)
    model, made, labels_B, latents = lively(VAR(config())), tokenizer(), torch.tensor([0, 2]), []
    model.__class__, model.passes = Recorder, []
    tokens_BL = model.generate(made, labels_B, cfg, generator=torch.Generator().manual_seed(0), growth=2.0,
                               smooth=smooth, latents=latents)
    f_hat_BCSS, inputs, rows = made.quantizer.initial(2), [], 2 if cfg else 1
    for k, tokens_Bl in enumerate(made.quantizer.split(tokens_BL)):
        grown = (k / 3)**2
        h_BlC = model.smoothed(tokens_Bl, model.passes[k], cfg * grown, smooth * grown, made.quantizer.codebook_VC)
        f_hat_BCSS = made.quantizer.add(f_hat_BCSS, h_BlC, k)
        torch.testing.assert_close(latents[k], f_hat_BCSS)
        if k < 3:
            inputs.append(made.quantizer.read(f_hat_BCSS, k + 1))
    assert len(latents) == 4
    assert (f_hat_BCSS - made.quantizer.decode(tokens_BL)).abs().max() > 1e-2
    labels_B = torch.cat([labels_B, torch.full((2,), 3)])[:2 * rows]
    expected = model(labels_B, torch.cat(inputs, dim=1).repeat(rows, 1, 1))
    torch.testing.assert_close(torch.cat(model.passes, dim=1), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_latents_that_are_not_smoothed_are_those_of_the_tokens():
    model, made, latents = lively(VAR(config())), tokenizer(), []
    tokens_BL = model.generate(made, torch.tensor([0, 2]), latents=latents)
    for end, f_hat_BCSS in zip(ENDS[1:], latents, strict=True):
        assert torch.equal(f_hat_BCSS, made.quantizer.decode(tokens_BL[:, :end]))
    one, latents = tokenizer(scales=(1,)), []   # a single scale, the first, has to choose
    tokens_BL = lively(VAR(config(scales=(1,)))).generate(one, torch.tensor([0, 1]), smooth=1.0, latents=latents)
    torch.testing.assert_close(latents, [one.quantizer.decode(tokens_BL)])


@torch.no_grad()
def test_drawing_a_scale_and_the_caches_can_be_replaced():
    """Where other models of the family differ: what is drawn, and what a layer remembers."""
    lengths = []

    class Watched(LayerCache):
        def slots(self, product_BlX, heads):
            lengths.append(product_BlX.shape[1])
            return super().slots(product_BlX, heads)

    class Other(VAR):
        draw = lambda self, logits_BlV, k, *how: torch.full(logits_BlV.shape[:2], k)
        new_caches = lambda self: [Watched(self.config.length) for _ in self.blocks]

    torch.manual_seed(0)
    tokens_BL = Other(config(depth=2)).eval().generate(tokenizer(), torch.tensor([0]), cfg=0.0)
    assert tokens_BL.tolist() == [[0] + [1] * 4 + [2] * 9 + [3] * 16]
    assert lengths == [1, 1, 4, 4, 9, 9, 16, 16]


@torch.no_grad()
def test_a_second_generation_makes_no_tables_and_waits_for_nothing(monkeypatch):
    """No tensor made of Python numbers, which is a copy to the device, and no number read back from there."""
    torch.manual_seed(0)
    model, made, labels_B = lively(VAR(config())), tokenizer(), torch.tensor([0, 2])
    f_BCSS = made.latent(images(made, 2))
    known = Known(f_BCSS, torch.zeros(2, 1, 4, 4).index_fill(3, torch.tensor([0]), 1), 4)
    model.generate(made, labels_B, known=known)
    tables = []
    monkeypatch.setattr(kernels.KeyRanges, "__init__", lambda *arguments: tables.append(arguments))
    with Operations() as operations:
        model.generate(made, labels_B, known=known)
    assert not tables and len(operations.names) > 100
    assert not {"_local_scalar_dense", "lift_fresh", "scalar_tensor", "nonzero"} & set(operations.names)


def test_tables_of_the_mask_go_where_the_model_goes(monkeypatch):
    asked = []
    monkeypatch.setattr(
        kernels.KeyRanges, "prepare", lambda ranges, device: asked.append(device.type))
    VAR(config()).to("meta")
    assert asked == ["cpu", "meta"]


def test_nothing_is_computed_that_apples_gpu_lacks():
    """Averages over areas where sides do not divide, and float64."""
    torch.manual_seed(0)
    model, made, labels_B = lively(VAR(config())).train(), tokenizer().train(), torch.tensor([0, 2])
    with Operations() as operations:
        reconstruction, losses = made(images(made, 2))
        (losses["mse"] + losses["l1"] + losses["codebook"]).backward()
        tokens_BL = made.encode(reconstruction.detach())
        model(labels_B, made.teacher_inputs(tokens_BL)).square().mean().backward()
        made.decode(model.eval().generate(made, labels_B, cfg=2.0))
    assert torch.float64 not in operations.dtypes and torch.float32 in operations.dtypes
    assert "convolution" in operations.names and not any("adaptive" in name for name in operations.names)


@pytest.mark.parametrize("half, training", [*itertools.product([False, True], repeat=2)])
def test_only_the_head_of_drawing_in_half_precision_is_in_tf32(half, training):
    """Not what codes are found with, nor anything in fp32."""
    model, made, labels_B = VAR(config()).train(training), tokenizer(), torch.tensor([0, 2])
    seen = {}
    for part, name in ((model.head, "head"), (model.blocks[0].mlp[0], "layer"), (model.code_embedding, "read")):
        part.register_forward_pre_hook(lambda *_, name=name: seen.update(
            {name: torch.backends.cuda.matmul.allow_tf32}))
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        model(labels_B, made.teacher_inputs(torch.zeros(2, model.config.length, dtype=torch.int64)))
    assert seen == {"head": half and not training, "layer": False, "read": False}
    assert not torch.backends.cuda.matmul.allow_tf32


@torch.no_grad()
@pytest.mark.parametrize("changes", [dict(), dict(shared_adaln=True)], ids=str)
def test_layers_in_half_precision_draw_the_tokens_that_autocast_does(changes):
    torch.manual_seed(0)
    model, made, labels_B = lively(VAR(config(**changes))), tokenizer(), torch.tensor([0, 2])
    drawn = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            tokens_BL = model.generate(made, labels_B, generator=torch.Generator().manual_seed(0))
            drawn.append((tokens_BL, model(labels_B, made.teacher_inputs(tokens_BL))))
        model.cast_layers(torch.bfloat16)
    for before, after in zip(*drawn):
        assert torch.equal(before, after)
    assert drawn[0][1].dtype == torch.float32   # what is drawn from is in fp32, in training alone it is not
    assert model.blocks[0].mlp[0].weight.dtype == torch.bfloat16 and model.head.weight.dtype == torch.float32


# -----------------------------------------------------------------------------
# In-painting


def known_left(made: Tokenizer, columns: int, **how) -> Known:
    """Two images of whose latent the left columns are known."""
    where_B1SS = torch.zeros(2, 1, made.config.scales[-1], made.config.scales[-1])
    where_B1SS[..., :columns] = 1
    with torch.no_grad():
        latent_BCSS = made.latent(images(made, 2))
    return Known(latent_BCSS, where_B1SS, **{**dict(known_scales=len(made.config.scales)), **how})


def test_which_tokens_are_known():
    """All of the maps up to a quarter of the side; then cells with any known part; of the finest, with half of it."""
    made = tokenizer(scales=(1, 2, 4, 8))
    row = lambda known, k: known.mask(made.quantizer, k)[0].view(made.config.scales[k], -1)[0].tolist()
    known = known_left(made, 3)
    assert row(known, 0) == [True] and row(known, 1) == [True, True]
    assert row(known, 2) == [True, True, False, False]
    assert row(known, 3) == [True] * 3 + [False] * 5
    known.where_B1SS[..., 3] = 0.5
    assert row(known, 3) == [True] * 4 + [False] * 4
    known.where_B1SS[..., 3] = 0.49
    assert row(known, 3) == [True] * 3 + [False] * 5
    assert not known_left(made, 0).mask(made.quantizer, 0).any()
    known = known_left(made, 3, known_from=0.5)   # of coarse maps, too, what is known enough
    assert row(known, 0) == [False] and row(known, 1) == [True, False]
    assert row(known, 2) == [True, True, False, False]
    known.known_from = 0.375
    assert row(known, 0) == [True] and row(known, 1) == [True, False]
    known.where_B1SS[..., 3] = 0.49
    assert row(known, 3) == [True] * 3 + [False] * 5
    known = known_left(made, 3)
    drawn_Bl, f_hat_BCSS = torch.full((2, 64), -1), made.quantizer.initial(2)
    put_Bl = known.put(drawn_Bl, made.quantizer, f_hat_BCSS, 3).view(2, 8, 8)
    assert (put_Bl[..., :3] >= 0).all() and (put_Bl[..., 3:] == -1).all()
    known.known_scales = 3   # finer ones are drawn
    assert torch.equal(known.put(drawn_Bl, made.quantizer, f_hat_BCSS, 3), drawn_Bl)
    assert (known.put(torch.full((2, 16), -1), made.quantizer, f_hat_BCSS, 2).view(2, 4, 4)[..., :2] >= 0).all()


@torch.no_grad()
def test_the_closed_loop_codes_what_is_missing_and_the_open_loop_the_images_own_tokens():
    made = tokenizer(vocabulary=128)
    closed = known_left(made, 2)
    own_BL = made.quantizer.encode(closed.latent_BCSS)
    opened = Known(closed.latent_BCSS, closed.where_B1SS, 4, own_BL)
    f_hat_BCSS = made.quantizer.initial(2)
    for k, own_Bl in enumerate(made.quantizer.split(own_BL)):
        # As long as f_hat is the image's own, both are the tokens of the encoder.
        assert torch.equal(closed.tokens(made.quantizer, f_hat_BCSS, k), own_Bl)
        assert torch.equal(opened.tokens(made.quantizer, f_hat_BCSS, k), own_Bl)
        other_BCSS = f_hat_BCSS + 0.5 * torch.randn_like(f_hat_BCSS)   # some of it was generated
        missing_BlC = made.quantizer.read(closed.latent_BCSS - other_BCSS, k)
        nearest = [torch.cdist(x_lC, made.quantizer.codebook_VC).argmin(dim=1) for x_lC in missing_BlC]
        assert torch.equal(closed.tokens(made.quantizer, other_BCSS, k), torch.stack(nearest))
        assert torch.equal(opened.tokens(made.quantizer, other_BCSS, k), own_Bl)
        f_hat_BCSS = made.quantizer.accumulate(f_hat_BCSS, own_Bl, k)


@torch.no_grad()
def test_in_painting_keeps_what_is_known_and_the_closed_loop_keeps_it_better():
    torch.manual_seed(0)
    made, labels_B, errors = tokenizer(vocabulary=128), torch.tensor([0, 2]), {}
    model = lively(VAR(config(vocabulary=128)))
    closed = known_left(made, 2)
    own_BL = made.quantizer.encode(closed.latent_BCSS)
    finest = lambda tokens_BL: tokens_BL[:, ENDS[3]:].view(2, 4, 4)
    for name, own_tokens_BL in (("closed", None), ("open", own_BL)):
        known = Known(closed.latent_BCSS, closed.where_B1SS, 4, own_tokens_BL)
        tokens_BL = model.generate(made, labels_B, generator=torch.Generator().manual_seed(0), known=known)
        same_BSS = finest(tokens_BL) == finest(own_BL)
        assert same_BSS[..., :2].all() == (name == "open")   # closed, they answer to what was generated beside them
        assert same_BSS[..., 2:].float().mean() < 0.2
        f_hat_BCSS = made.quantizer.decode(tokens_BL)
        errors[name] = (f_hat_BCSS - closed.latent_BCSS)[..., :2].square().mean()
    assert errors["closed"] < errors["open"]
    everything = Known(closed.latent_BCSS, torch.ones_like(closed.where_B1SS), 4)
    assert torch.equal(model.generate(made, labels_B, known=everything), own_BL)
