"""The tokenizer: encoding and decoding agree, losses and gradients are NumPy's, codes start and come back as they
should, bad shapes are refused."""
import copy
import hashlib

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from support.checkpoint import fingerprint
from support.evaluation import psnr, tokenizer_health
from tokenizer import Quantizer, Tokenizer, TokenizerConfig, averaged, choose_phis


def config(**changes) -> TokenizerConfig:
    return TokenizerConfig(**{**dict(scales=(1, 2, 3, 4), vocabulary=32, code_channels=4, image_channels=3, width=8,
                                     multipliers=(1, 2), blocks=1, phis=4, norm_groups=2), **changes})


def tokenizer(seed: int = 0, **changes) -> Tokenizer:
    """With a codebook of real residuals, as after the unquantized steps of training."""
    torch.manual_seed(seed)
    made = Tokenizer(config(**changes)).eval()
    made.quantizer.start_from(made.latent(images(made, 64)).detach())
    return made


def images(made: Tokenizer, count: int) -> torch.Tensor:
    return torch.rand(count, made.config.image_channels, *[made.config.image_side] * 2) * 2 - 1


def quantizer(seed: int = 0, **changes) -> Quantizer:
    """In float64, with sides that divide each other, random codes, and phis that do something."""
    torch.manual_seed(seed)
    made = Quantizer(config(**{**dict(scales=(1, 2, 4), vocabulary=8, code_channels=2, phis=3), **changes})).double()
    with torch.no_grad():
        made.codebook_VC.normal_()
        for phi in made.phis:
            phi.weight.normal_(std=0.3)
            phi.bias.normal_(std=0.3)
    return made


def in_numpy(made: Quantizer) -> dict:
    """What tests/reference.py needs of it."""
    phis = [made.phis[i] for i in made.phi_of_scale]
    return dict(codebook_VC=made.codebook_VC.detach().numpy(), scales=made.scales,
                phis=[(phi.weight.detach().numpy(), phi.bias.detach().numpy()) for phi in phis])


GROWING = st.lists(st.integers(1, 3), min_size=0, max_size=4).map(lambda steps: tuple(1 + sum(steps[:i]) for i in range(len(steps) + 1)))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(scales=GROWING, phis=st.integers(1, 5), channels=st.sampled_from((1, 3)))
def test_every_pyramid_encodes_and_decodes(scales, phis, channels):
    made = tokenizer(scales=scales, phis=phis, image_channels=channels)
    x, L = images(made, 2), sum(s * s for s in scales)
    tokens_BL = made.encode(x)
    assert tokens_BL.shape == (2, L) and tokens_BL.dtype == torch.int64
    assert made.decode(tokens_BL).shape == x.shape
    assert made.teacher_inputs(tokens_BL).shape == (2, L - 1, 4)


@torch.no_grad()
def test_decode_of_encode_is_the_quantizers_own_output():
    made = tokenizer()
    f_BCSS = made.latent(images(made, 8))
    torch.testing.assert_close(made.quantizer.decode(made.quantizer.encode(f_BCSS)), made.quantizer(f_BCSS)[0])


@torch.no_grad()
def test_the_residual_shrinks_with_every_scale():
    made = tokenizer(vocabulary=256)
    f_BCSS = made.latent(images(made, 64))
    tokens, f_hat_BCSS = made.quantizer.split(made.quantizer.encode(f_BCSS)), made.quantizer.initial(64)
    sizes = [f_BCSS.square().mean().item()]
    for k, tokens_Bl in enumerate(tokens):
        f_hat_BCSS = made.quantizer.accumulate(f_hat_BCSS, tokens_Bl, k)
        sizes.append((f_BCSS - f_hat_BCSS).square().mean().item())
    assert all(after < before for before, after in zip(sizes, sizes[1:])), sizes


@torch.no_grad()
def test_teacher_inputs_read_the_running_latent_of_coarser_scales_only():
    made = tokenizer()
    tokens_BL = made.encode(images(made, 3))
    inputs, ends = made.teacher_inputs(tokens_BL), [1, 5, 14, 30]
    for k in range(1, 4):
        so_far = made.quantizer.decode(tokens_BL[:, :ends[k - 1]])
        torch.testing.assert_close(inputs[:, ends[k - 1] - 1:ends[k] - 1], made.quantizer.read(so_far, k))


def test_gradients_pass_straight_through_to_the_encoder():
    """The value of f_hat, the gradient of f."""
    made = tokenizer().train()
    f_BCSS = made.latent(images(made, 4)).detach().requires_grad_()
    out_BCSS, _ = made.quantizer(f_BCSS)
    weight = torch.randn_like(out_BCSS)
    (out_BCSS * weight).sum().backward()
    torch.testing.assert_close(f_BCSS.grad, weight)
    assert made.quantizer.codebook_VC.grad is None


def test_every_step_of_the_loop_is_numpys():
    """Codes, upsampled and through phi, added up; and what the next scale reads of the sum."""
    made = quantizer()
    f_BCSS = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    tokens = [x.numpy() for x in made.split(made.encode(f_BCSS))]
    f_hats = reference.running_latents(tokens, **in_numpy(made))
    so_far, codebook_VC = [0.0, *f_hats], made.codebook_VC.detach().numpy()
    for k, s in enumerate(made.scales):
        residual_NC = reference.read(f_BCSS.numpy() - so_far[k], s).reshape(-1, 2)
        assert (tokens[k].reshape(-1) == reference.distances(residual_NC, codebook_VC).argmin(axis=1)).all()
    decoded_BCSS = made.decode(torch.from_numpy(np.concatenate(tokens, axis=1)))
    np.testing.assert_allclose(decoded_BCSS.numpy(), f_hats[-1], atol=1e-12)
    inputs = made.teacher_inputs(torch.from_numpy(np.concatenate(tokens, axis=1))).numpy()
    read = np.concatenate([reference.read(f_hats[0], 2), reference.read(f_hats[1], 4)], axis=1)
    np.testing.assert_allclose(inputs, read, atol=1e-12)


def areas(s: int, S: int) -> list[slice]:
    """The places of a side of S that each of s areas covers, whole or in part."""
    return [slice(S * i // s, -(-S * (i + 1) // s)) for i in range(s)]


@torch.no_grad()
@pytest.mark.parametrize("scales", [(1, 2, 3, 4, 5, 6, 8, 10, 13, 16), tuple(range(1, 8)), (1,)], ids=str)
def test_every_area_of_every_scale_is_averaged_as_numpy_does(scales):
    S = scales[-1]
    made = Quantizer(config(scales=scales))
    f_BCSS = torch.randn(2, 3, S, S)
    for k, s in enumerate(scales):
        expected = np.stack([f_BCSS.numpy()[:, :, rows, columns].mean(axis=(2, 3), dtype=np.float64)
                             for rows in areas(s, S) for columns in areas(s, S)], axis=1)
        np.testing.assert_allclose(made.read(f_BCSS, k).numpy(), expected, atol=1e-6)
    assert torch.equal(made.read(f_BCSS, len(scales) - 1), f_BCSS.flatten(2).mT)   # the finest is read as it is
    assert "areas_XS" not in made.state_dict()
    before = made.read(f_BCSS, 0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made.read(f_BCSS, 0), before)


def test_the_codebook_loss_and_its_gradients_are_numpys():
    """Codes and phis move to the latent at full weight, the latent moves to them at a quarter, each scale alike."""
    made = quantizer().train()
    f_BCSS = torch.randn(3, 2, 4, 4, dtype=torch.float64).requires_grad_()
    _, loss = made(f_BCSS)
    loss.backward()
    tokens = [x.numpy() for x in made.split(made.encode(f_BCSS.detach()))]
    known, f = in_numpy(made), f_BCSS.detach().numpy()

    def distance(f, known):
        """Mean over the scales of the mean squared error."""
        return np.mean([np.square(f_hat - f).mean() for f_hat in reference.running_latents(tokens, **known)])

    np.testing.assert_allclose(loss.item(), 1.25 * distance(f, known))
    np.testing.assert_allclose(f_BCSS.grad.numpy(), 0.25 * reference.slopes(lambda x: distance(x, known), f), atol=1e-9)
    moved = reference.slopes(lambda x: distance(f, {**known, "codebook_VC": x}), known["codebook_VC"])
    np.testing.assert_allclose(made.codebook_VC.grad.numpy(), moved, atol=1e-9)
    for k in range(3):   # a phi for each scale here
        def with_bias(x):
            phis = [(weight, x if i == k else bias) for i, (weight, bias) in enumerate(known["phis"])]
            return distance(f, {**known, "phis": phis})
        moved = reference.slopes(with_bias, known["phis"][k][1])
        np.testing.assert_allclose(made.phis[made.phi_of_scale[k]].bias.grad.numpy(), moved, atol=1e-9)


def test_a_training_pass_keeps_residuals_without_their_graph_and_counts_hits():
    made = quantizer().train()
    f_BCSS = torch.randn(3, 2, 4, 4, dtype=torch.float64).requires_grad_()
    made(f_BCSS)
    tokens_BL = made.encode(f_BCSS.detach())
    so_far = [0.0, *reference.running_latents([x.numpy() for x in made.split(tokens_BL)], **in_numpy(made))]
    for k, residual_BlC in enumerate(made.last_residuals):
        assert not residual_BlC.requires_grad
        expected = reference.read(f_BCSS.detach().numpy() - so_far[k], made.scales[k])
        np.testing.assert_allclose(residual_BlC.numpy(), expected, atol=1e-12)
    assert torch.equal(made.last_tokens_BL, tokens_BL)
    assert made.count(tokens_BL).tolist() == np.bincount(tokens_BL.numpy().ravel(), minlength=8).tolist()
    kept, residuals = made.last_tokens_BL, made.last_residuals
    made.eval()(2 * f_BCSS)
    assert made.last_tokens_BL is kept and made.last_residuals is residuals   # evaluation keeps nothing
    made.train()(f_BCSS[:2])
    assert made.last_tokens_BL.shape == (2, 21) and len(made.last_residuals) == 3   # those of the last pass only


class Operations(TorchDispatchMode):
    """The names of all that is computed, and the dtypes of what comes of it."""
    def __init__(self):
        super().__init__()
        self.names, self.dtypes = [], set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        out = function(*args, **(kwargs or {}))
        self.dtypes |= {x.dtype for x in tree_leaves(out) if isinstance(x, torch.Tensor)}
        return out


def test_a_training_pass_waits_for_no_number_of_a_gpu():
    made = quantizer().train()
    with Operations() as operations:
        made(torch.randn(3, 2, 4, 4, dtype=torch.float64))
        made.update_hits(made.count(made.last_tokens_BL))
    waiting = {"_local_scalar_dense", "nonzero", "bincount", "lift_fresh", "scalar_tensor"}
    assert "scatter_add_" in operations.names and not waiting & set(operations.names)


@pytest.mark.parametrize("vocabulary, shares", [(9, (3, 3, 3)), (8, (3, 3, 2)), (2, (1, 1, 0)), (1, (1, 0, 0))])
def test_the_first_codes_are_residuals_of_every_scale_alike(vocabulary, shares):
    """Of what coarser scales leave over, each written with the codes there then: codes to come do not serve yet."""
    made = quantizer(vocabulary=vocabulary)
    f_BCSS = torch.randn(6, 2, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        made.codebook_VC.zero_()   # nearer to most residuals than any of them is
    made.start_from(f_BCSS)
    known, tokens, end = in_numpy(made), [], 0
    for s, share in zip(made.scales, shares):
        so_far = reference.running_latents(tokens, **known)[-1] if tokens else 0.0
        residual_NC = reference.read(f_BCSS.numpy() - so_far, s).reshape(-1, 2)
        end += share
        distance_NV = reference.distances(residual_NC, known["codebook_VC"][:end])
        assert (distance_NV[:, end - share:].min(axis=0) < 1e-20).all()   # each code is one of the residuals
        assert len(set(distance_NV[:, end - share:].argmin(axis=0))) >= min(share, 2)   # and not always the same
        tokens.append(distance_NV.argmin(axis=1).reshape(6, -1))


def test_remember_is_a_running_average_of_the_hits_of_a_step():
    made = quantizer()
    made.hits_V[:] = 2.0
    counts_V = torch.tensor([12, 0, 2, 0, 0, 0, 0, 0])
    made.update_hits(counts_V)
    expected = [0.99 * 2 + 0.01 * hits for hits in counts_V.tolist()]
    torch.testing.assert_close(made.hits_V.tolist(), expected)
    assert counts_V.tolist() == [12, 0, 2, 0, 0, 0, 0, 0]


def test_revive_moves_dead_codes_only_and_makes_them_new():
    made, residuals = quantizer(vocabulary=400), []
    for k, s in enumerate(made.scales):   # which residual a code became can be read off it: (scale, row)
        row_N = torch.arange(3.0 * s * s)
        residuals.append(torch.stack([torch.full_like(row_N, k), row_N], dim=1).double().view(3, s * s, 2))
    optimizer = torch.optim.AdamW(made.parameters())
    optimizer.state[made.codebook_VC] = {name: torch.ones(400, 2) for name in ("exp_avg", "exp_avg_sq")}
    with torch.no_grad():
        made.codebook_VC.fill_(-7)
    made.hits_V[:100] = 1.0
    made.hits_V[100:] = 0.01
    made.hits_V[100] = 0.0501 * made.hits_V.mean()   # just alive
    made.hits_V[101] = 0.0495 * made.hits_V.mean()   # just dead
    average = made.hits_V.mean().item()
    assert made.revive(residuals, optimizer) == 299
    assert (made.codebook_VC[:101] == -7).all()
    assert made.hits_V[:100].eq(1).all() and made.hits_V[101:].allclose(torch.tensor(average, dtype=torch.float64))
    for name in ("exp_avg", "exp_avg_sq"):
        moment_VC = optimizer.state[made.codebook_VC][name]
        assert moment_VC[:101].min() > 0 and moment_VC[101:].abs().max() == 0
    del optimizer.state[made.codebook_VC]   # as before the first step that is not left out
    made.hits_V[0] = 0
    assert made.revive(residuals, optimizer) == 2   # 100 is no longer alive
    scale_N, row_N = made.codebook_VC[101:].detach().long().T
    for k, s in enumerate(made.scales):
        rows = row_N[scale_N == k]
        assert 75 <= len(rows) <= 125              # every scale alike, however many residuals it has
        assert rows.unique().numel() >= 0.7 * 3 * s * s   # and all of them, of all images


def test_hits_do_not_depend_on_how_a_step_is_split():
    whole, parts = tokenizer().train(), tokenizer().train()
    batch = images(whole, 8)
    whole(batch)
    whole.quantizer.update_hits(whole.quantizer.count(whole.quantizer.last_tokens_BL))
    counts_V = 0
    for part in batch.split(2):
        parts(part)
        counts_V = counts_V + parts.quantizer.count(parts.quantizer.last_tokens_BL)
    parts.quantizer.update_hits(counts_V)
    assert torch.equal(whole.quantizer.hits_V, parts.quantizer.hits_V) and whole.quantizer.hits_V.max() > 1


def test_phis_of_the_published_models():
    assert choose_phis(10, 4) == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]   # scales 3 and 8 are ties that rounding decides
    assert choose_phis(1, 4) == [0]
    assert choose_phis(3, 1) == [0, 0, 0]
    assert choose_phis(4, 4) == [0, 1, 2, 3]
    assert choose_phis(12, 5) == [0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 4]


@pytest.mark.parametrize("changes, told", [
    (dict(scales=(2, 4)), "start at 1"), (dict(scales=(1, 3, 3)), "grow"), (dict(scales=()), "start at 1"),
    (dict(width=9), "not divisible by 2 groups"), (dict(width=1, multipliers=(2, 4)), "1 times 1 is not divisible")])
def test_impossible_shapes_are_refused(changes, told):
    with pytest.raises(ValueError, match=told):
        config(**changes)


def test_images_and_tokens_of_another_size_are_refused():
    made = tokenizer()
    with pytest.raises(ValueError, match="need 8 x 8"):
        made.encode(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="need 8 x 8"):
        made.encode(torch.zeros(1, 3, 16, 8))
    with pytest.raises(ValueError, match="7 tokens"):
        made.decode(torch.zeros(1, 7, dtype=torch.int64))


def test_a_training_pass_returns_its_losses_by_name():
    made = tokenizer().train()
    x = images(made, 4)
    for quantize in (True, False):
        y, losses = made(x, quantize)
        difference = (y - x).detach().numpy()
        assert losses["mse"].item() == pytest.approx(np.square(difference).mean(), rel=1e-5)
        assert losses["l1"].item() == pytest.approx(np.abs(difference).mean(), rel=1e-5)
        assert (losses["codebook"] > 0) == quantize and losses.keys() == {"mse", "l1", "codebook"}
    y, losses = made(x)
    f_BCSS, loss = made.quantizer(made.latent(x))
    assert torch.equal(y, made.render(f_BCSS)) and torch.equal(losses["codebook"], loss)


@torch.no_grad()
def test_at_the_start_convolutions_keep_sizes_branches_are_silent_and_phi_does_nothing():
    torch.manual_seed(0)
    made = Tokenizer(config(width=32))
    for phi in made.quantizer.phis:
        h_BCSS = torch.randn(2, 4, 4, 4)
        torch.testing.assert_close(phi(h_BCSS), h_BCSS)
    x = torch.randn(2, 64, 4, 4)
    for part in (*made.encoder.middle, *made.decoder.middle):
        assert torch.equal(part(x), x)
    first, attention, _ = made.encoder.middle
    for conv in (made.decoder.conv_in, made.encoder.levels[1].blocks[0].shortcut, first.conv1, attention.qkv):
        assert conv.weight.std().item() == pytest.approx(conv.weight[0].numel() ** -0.5, rel=0.1)
    assert not any(part.bias.any() for part in made.modules() if isinstance(part, torch.nn.Conv2d))


@pytest.mark.parametrize("s", [1, 2, 3, 4])
def test_a_smaller_latent_is_compared_with_the_smaller_image(s):
    """Of the latent itself, before codes; with gradients for the encoder, too."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(TokenizerConfig(
        scales=(1, 2, 4), vocabulary=5, code_channels=2, image_channels=3, width=4, multipliers=(1, 2),
        blocks=1, phis=2, norm_groups=2)).train()
    torch.nn.init.normal_(tokenizer.quantizer.codebook_VC)
    images = torch.rand(3, 3, 8, 8) * 2 - 1
    losses = tokenizer(images, True, s)[1]
    tokenizer.decoder._compiled_call_impl = pytest.fail   # a compiled one would be for every side anew
    tokenizer.smaller_loss(tokenizer.latent(images), images, s)
    tokenizer.decoder._compiled_call_impl = None
    small = tokenizer.render(F.adaptive_avg_pool2d(tokenizer.latent(images), s))
    difference = small - F.adaptive_avg_pool2d(images, 2 * s)
    expected = difference.square().mean() + 0.2 * difference.abs().mean()
    assert losses["smaller"].item() == pytest.approx(expected.item(), rel=1e-5)
    weights = [tokenizer.encoder.conv_in.weight, tokenizer.decoder.conv_out.weight]
    for got, wanted in zip(torch.autograd.grad(losses["smaller"], weights),
                           torch.autograd.grad(expected, weights), strict=True):
        assert torch.allclose(got, wanted, atol=1e-6) and got.any()
    assert "smaller" not in tokenizer(images, True)[1]
    smaller = averaged(images, s)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(averaged(images, s), smaller)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_decoder_in_half_precision_is_nearly_the_same(dtype):
    made = tokenizer()
    tokens_BL = made.encode(images(made, 2))
    before = made.decode(tokens_BL)
    made.cast_decoder(dtype)
    assert made.from_latent.weight.dtype == made.decoder.conv_out.weight.dtype == dtype
    with torch.autocast("cpu", dtype):
        after = made.decode(tokens_BL)
    assert after.dtype == torch.float32 and 0 < (after - before).abs().max() < 0.1


# -----------------------------------------------------------------------------
# Health and identity


def test_psnr():
    """Of images in [-1, 1], whose greatest squared error is 4."""
    assert psnr(4) == 0 and psnr(0.04) == pytest.approx(20) and psnr(0) == pytest.approx(106.0206, abs=1e-3)


@torch.no_grad()
def test_health_is_what_counting_gives():
    made = tokenizer()
    x = images(made, 7)
    health = tokenizer_health(made, iter((x[:5], x[5:])))
    tokens_BL = made.encode(x)
    ends = np.cumsum([0, *(s * s for s in made.config.scales)])
    for k in range(4):
        tokens_N = tokens_BL[:, ends[k]:ends[k + 1]].numpy().ravel()
        counts = np.unique(tokens_N, return_counts=True)[1]
        share = counts / counts.sum()
        error = np.square(made.decode(tokens_BL[:, :ends[k + 1]]).numpy() - x.numpy()).mean()
        assert health["codes_per_scale"][k] == len(counts)
        assert health["usage_per_scale"][k] == pytest.approx(len(counts) / min(32, len(tokens_N)))
        assert health["perplexity_per_scale"][k] == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-5)
        assert health["psnr_per_scale"][k] == pytest.approx(10 * np.log10(4 / error), rel=1e-5)
    assert health["codes_used"] == len(np.unique(tokens_BL.numpy())) / 32


def test_a_fingerprint_is_of_weights_and_config_and_not_of_training():
    made = tokenizer()
    before = fingerprint(made)
    assert len(before) == 64 and fingerprint(copy.deepcopy(made)) == before
    made.train()(images(made, 2))
    made.quantizer.update_hits(made.quantizer.count(made.quantizer.last_tokens_BL))
    assert fingerprint(made) == before                    # hits and residuals are not what it computes
    with torch.no_grad():
        for parameter in list(made.parameters())[::5]:
            parameter[(0,) * parameter.ndim] += 1e-3
            changed = fingerprint(made)
            assert changed != before
            before = changed
    other = Tokenizer(config(norm_groups=4))               # the same weights compute something else
    other.load_state_dict(made.state_dict())
    assert fingerprint(other) != before


def test_a_fingerprint_is_forever():
    """By it the transformers of old runs know their tokenizers."""
    model = torch.nn.Linear(1, 1)
    model.config = config()
    weight, bias = (x.detach().numpy().tobytes() for x in (model.weight, model.bias))
    told = repr(config()).encode() + b"bias" + bias + b"weight" + weight
    assert fingerprint(model) == hashlib.sha256(told).hexdigest()
