"""The tokenizer: encoding and decoding agree, residuals shrink, dead codes come back, bad shapes are refused."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenizer import Tokenizer, TokenizerConfig, choose_phis


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
    tokens, f_hat_BCSS = made.quantizer.split(made.quantizer.encode(f_BCSS)), made.quantizer.empty(64)
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
    made = tokenizer().train()
    f_BCSS = made.latent(images(made, 4)).detach().requires_grad_()
    out_BCSS, _ = made.quantizer(f_BCSS)
    weight = torch.randn_like(out_BCSS)
    (out_BCSS * weight).sum().backward()
    torch.testing.assert_close(f_BCSS.grad, weight)


def test_dead_codes_become_residuals_and_live_ones_stay():
    made = tokenizer().train()
    quantizer, optimizer = made.quantizer, torch.optim.AdamW(made.parameters(), 1e-3)
    with torch.no_grad():
        quantizer.codebook_VC[5:] = 1e3   # no residual is near
    for _ in range(400):   # the hit counts forget slowly
        quantizer.new_hits_V = torch.bincount(torch.randint(0, 5, (40,)), minlength=len(quantizer.hits_V))
        quantizer.remember()
    made(images(made, 8))[1]["total"].backward()
    optimizer.step()
    before_VC = quantizer.codebook_VC.detach().clone()
    assert quantizer.revive(optimizer) == 27
    assert torch.equal(quantizer.codebook_VC[:5], before_VC[:5])
    assert quantizer.codebook_VC[5:].abs().max() < 100
    assert optimizer.state[quantizer.codebook_VC]["exp_avg"][5:].abs().max() == 0
    assert quantizer.revive(optimizer) == 0


def test_hits_do_not_depend_on_how_a_step_is_split():
    whole, parts = tokenizer().train(), tokenizer().train()
    parts.load_state_dict(whole.state_dict())
    batch = images(whole, 8)
    whole(batch)
    for part in batch.split(2):
        parts(part)
    for made in (whole, parts):
        made.quantizer.remember()
    assert torch.equal(whole.quantizer.hits_V, parts.quantizer.hits_V) and whole.quantizer.hits_V.max() > 1


def test_phis_of_the_published_models():
    assert choose_phis(10, 4) == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]   # scales 3 and 8 are ties that rounding decides
    assert choose_phis(1, 4) == [0]
    assert choose_phis(3, 1) == [0, 0, 0]
    assert choose_phis(4, 4) == [0, 1, 2, 3]


@pytest.mark.parametrize("changes, told", [
    (dict(scales=(2, 4)), "start at 1"), (dict(scales=(1, 3, 3)), "grow"), (dict(scales=()), "start at 1"),
    (dict(width=9), "not divisible by 2 groups")])
def test_impossible_shapes_are_refused(changes, told):
    with pytest.raises(ValueError, match=told):
        config(**changes)


def test_images_and_tokens_of_another_size_are_refused():
    made = tokenizer()
    with pytest.raises(ValueError, match="need 8 x 8"):
        made.encode(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="7 tokens"):
        made.decode(torch.zeros(1, 7, dtype=torch.int64))
