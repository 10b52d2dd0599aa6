"""The transformer: nothing later moves an earlier logit, and generation computes what teaching does."""
import math

import pytest
import torch
import torch.nn.functional as F

import kernels
from tokenizer import Tokenizer
from test_tokenizer import images, tokenizer
from var import VAR, VARConfig

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


def test_the_first_loss_is_ln_v():
    torch.manual_seed(0)
    model = VAR(config(vocabulary=512))
    loss = F.cross_entropy(model(torch.tensor([0, 1]), torch.randn(2, 29, 4)).flatten(0, 1), torch.randint(512, (60,)))
    assert abs(loss.item() - math.log(512)) < 0.05


@pytest.mark.skipif(kernels.triton is None, reason="Triton is not installed")
def test_both_faces_give_the_same_loss_and_gradients(monkeypatch):
    torch.manual_seed(0)
    model, made = lively(VAR(config())), tokenizer()
    tokens_BL = made.encode(images(made, 2))
    results = {}
    for face in ("torch", "triton"):
        monkeypatch.setattr(kernels, "FACE", face)
        model.zero_grad()
        logits_BLV = model(torch.tensor([0, 2]), made.teacher_inputs(tokens_BL))
        loss = F.cross_entropy(logits_BLV.flatten(0, 1), tokens_BL.flatten())
        loss.backward()
        results[face] = [loss.detach(), *(p.grad for p in model.parameters())]
    for ours, twin in zip(results["triton"], results["torch"]):
        torch.testing.assert_close(ours, twin, rtol=1e-3, atol=1e-5)



def test_widths_that_heads_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="not divisible by 3 heads"):
        config(heads=3)
