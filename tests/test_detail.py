"""The losses that keep detail: each against its formula, and in the tokenizer's training."""
from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import train
from support.checkpoint import save_checkpoint
from support.cli import UserError
from support.data import Data
from support.devices import Machine
from support.evaluation import Classifier, kept_classifier, train_classifier
from support.figures import draw_curves
from support.images import to_float
from support.losses import (
    DetailLosses, Discriminator, balance, edge_loss, load_lpips, perceptual_distance,
)
from support.presets import Preset
from support.watching import read_log

DETAILED = Preset(   # both losses, the discriminator's from step 6 of 12
    image_size=8, scales=(1, 2, 4), multipliers=(1, 2), tokenizer_width=8, vocabulary=32,
    code_channels=4, edge_weight=0.5, smaller_weight=0.0, tokenizer_steps=12,
    warmup=5, perceptual_weight=0.1, adversarial_weight=0.4, adversarial_from=0.5,
    discriminator_width=8, discriminator_lr=1.5e-3)
FP32 = Machine(torch.device("cpu"), torch.float32)


@pytest.fixture(autouse=True)
def quick_classifier(monkeypatch):
    monkeypatch.setattr("support.evaluation.CLASSIFIER_STEPS", 3)


def detailed_stage(out: Path, machine: Machine = FP32, lpips_weights: Path | None = None,
                   values: dict | None = None, **settings) -> train.TokenizerStage:
    """A tokenizer's training with both losses."""
    generator = torch.Generator().manual_seed(0)
    sets = []
    for count in (20, 10):
        images = torch.randint(256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator)
        sets.append(TensorDataset(images, torch.arange(count) % 2))
    preset = replace(DETAILED, **values or {})
    settings = train.Settings(preset, machine, out, **settings)
    return train.TokenizerStage(Data(*sets, ["cat", "dog"], "random"), settings, lpips_weights)


def test_one_class_gives_a_classifier_nothing_to_learn():
    with pytest.raises(UserError, match="one class gives nothing to learn; --perceptual-weight 0"):
        DetailLosses(DETAILED, 3, 1).learn(torch.zeros(1, 3, 8, 8), torch.zeros(1))


def test_all_processes_have_the_classifier_of_the_first(monkeypatch):
    losses = DetailLosses(DETAILED, 3, 2)
    monkeypatch.setattr("support.losses.train_classifier", lambda *_: Classifier(**losses.shape))
    monkeypatch.setattr("support.losses.copy_from_first", lambda x: x.fill_(5))
    losses.learn(torch.zeros(2, 3, 8, 8), torch.arange(2))
    assert all((value == 5).all() for value in losses.classifier.state_dict().values())


def batch(stage: train.TokenizerStage) -> list[torch.Tensor]:
    return list(stage.data.train[list(range(8))])


# The formulas


def test_the_perceptual_distance():
    rng = np.random.default_rng(0)
    levels = [(2, 5, 4, 4), (2, 3, 2, 2)]
    x, y = ([rng.standard_normal(shape) for shape in levels] for _ in range(2))
    expected = 0.0
    for a, b in zip(x, y):
        places = []
        for n in range(a.shape[0]):
            for i, j in np.ndindex(a.shape[2:]):
                u = a[n, :, i, j] / np.linalg.norm(a[n, :, i, j])
                v = b[n, :, i, j] / np.linalg.norm(b[n, :, i, j])
                places.append(np.square(u - v).sum())
        expected += np.mean(places)
    x, y = ([torch.from_numpy(level).float() for level in levels] for levels in (x, y))
    assert perceptual_distance(x, y).item() == pytest.approx(expected, rel=1e-4)
    assert perceptual_distance(x, x) == 0
    lighter = [3 * level for level in x]
    assert perceptual_distance(x, lighter).item() < 1e-4   # contrast is no matter
    nothing = torch.zeros(2, 5, 4, 4, requires_grad=True)   # after a ReLU
    perceptual_distance([nothing], x[:1]).backward()
    assert nothing.grad.isfinite().all()


def test_what_a_discriminator_says_is_of_patches():
    discriminator = Discriminator(3, 4)
    x = torch.randn(1, 3, 64, 64)
    before = discriminator(x)
    assert before.shape == (1, 1, 8, 8)
    nn.init.normal_(discriminator.conv_out.weight)
    reached = torch.zeros(64, 64)
    x.requires_grad_()
    for layer in discriminator.layers:   # which normalise over the whole image
        if isinstance(layer, nn.GroupNorm):
            layer.forward = lambda x: x
    discriminator(x)[0, 0, 4, 4].backward()
    reached = x.grad.abs().sum(dim=(0, 1)) > 0
    assert reached.any(dim=0).sum() <= 38 and reached.any(dim=1).sum() <= 38


@pytest.mark.parametrize("logit, loss, right", [(0.4, (0.6 + 1.4) / 2, 0.5), (3.0, 4 / 2, 0.5),
                                                (-2.0, 3 / 2, 0.5), (0.0, 1.0, 0.5)])
def test_the_hinge(logit, loss, right):
    """Of a discriminator that says the same of everything."""
    discriminator = Discriminator(1, 4)
    nn.init.zeros_(discriminator.conv_out.weight)
    nn.init.constant_(discriminator.conv_out.bias, logit)
    x = torch.randn(2, 1, 16, 16)
    y = torch.randn(2, 1, 16, 16, requires_grad=True)
    found, share = discriminator.loss(x, y)
    assert found.item() == pytest.approx(loss) and share == right
    assert discriminator.adversarial_loss(y).item() == pytest.approx(-logit)


def test_a_discriminator_is_numpys():
    """On the smallest image: strided convolutions, norm over an image, a leak of 0.2."""
    torch.manual_seed(0)
    discriminator = Discriminator(1, 2)
    image = torch.randn(1, 1, 8, 8)
    x = image[0].double().numpy()
    for layer in [*discriminator.layers, discriminator.conv_out]:
        if isinstance(layer, nn.Conv2d):
            weight, bias = (p.detach().double().numpy() for p in (layer.weight, layer.bias))
            padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
            size, stride = weight.shape[2], layer.stride[0]
            side = (padded.shape[1] - size) // stride + 1
            x = np.empty((len(weight), side, side))
            for i, j in np.ndindex(side, side):
                patch = padded[:, i * stride:i * stride + size, j * stride:j * stride + size]
                x[:, i, j] = np.tensordot(weight, patch, 3) + bias
        elif isinstance(layer, nn.GroupNorm):
            x = (x - x.mean()) / np.sqrt(x.var() + layer.eps)
        else:
            x = np.where(x > 0, x, 0.2 * x)
    assert discriminator(image).item() == pytest.approx(x.item(), rel=1e-4)


def test_a_discriminator_learns_which_are_originals():
    torch.manual_seed(0)
    discriminator = Discriminator(1, 4)
    optimizer = torch.optim.Adam(discriminator.parameters(), 1e-2)
    x, y = torch.randn(4, 1, 16, 16), torch.zeros(4, 1, 16, 16)
    for _ in range(20):
        optimizer.zero_grad()
        loss, right = discriminator.loss(x, y)
        loss.backward()
        optimizer.step()
    assert loss < 0.2 and right == 1
    assert (discriminator(x) > 0).all() and (discriminator(y) < 0).all()
    assert discriminator.adversarial_loss(x) < discriminator.adversarial_loss(y)   # what it takes for originals


def test_neither_loss_moves_the_other_s_weights():
    discriminator = Discriminator(1, 4)
    y = torch.randn(2, 1, 16, 16, requires_grad=True)
    discriminator.adversarial_loss(y).backward()
    assert y.grad.abs().max() > 0
    assert all(p.grad is None and p.requires_grad for p in discriminator.parameters())
    y.grad = None
    discriminator.loss(torch.randn(2, 1, 16, 16), y)[0].backward()
    assert y.grad is None and all(p.grad is not None for p in discriminator.parameters())


def test_where_a_map_is_nearly_0_its_noise_does_not_count():
    x_1C11 = torch.zeros(1, 2, 1, 1)
    y_1C11 = torch.tensor([1e-4, 0.0]).view(1, 2, 1, 1)
    assert perceptual_distance([x_1C11], [y_1C11]).item() == pytest.approx(0.01)
    assert perceptual_distance([y_1C11], [x_1C11]).item() == pytest.approx(0.01)


def test_the_balance_of_gradients():
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    x, target = torch.randn(5, 4), torch.randn(5, 3)
    y = layer(x)
    likeness, adversarial = (y - target).square().mean(), y.sum().sin()
    found = balance(likeness, adversarial, layer.weight, torch.tensor(1.0))
    grad_y = 2 * (y - target) / y.numel()
    one = (grad_y.T @ x).norm()
    other = (y.sum().cos() * torch.ones(3, 5) @ x).norm()
    torch.testing.assert_close(found, one / other, rtol=1e-4, atol=0)
    assert not found.requires_grad
    for scale in map(torch.tensor, (1.0, 2.0**16)):   # by which nothing changes
        torch.testing.assert_close(10 * balance(likeness, 10 * adversarial, layer.weight, scale),
                                   found, rtol=1e-3, atol=0)
        assert balance(likeness, 1e-9 * adversarial, layer.weight, scale) == 1e4
        torch.testing.assert_close(   # less than a millionth counts for little
            balance(1e-6 * likeness, 1e-9 * adversarial, layer.weight, scale),
            one / (1 + 1e-3 * other), rtol=1e-3, atol=0)
    for losses in ((likeness, 1e38 * adversarial), (1e38 * likeness, adversarial)):
        assert balance(*losses, layer.weight, torch.tensor(1.0)).isnan()   # not 0, nor the most
    (likeness + found * adversarial).backward()   # the graph is still there


def test_the_balance_is_that_of_the_images_of_all_processes(monkeypatch):
    """Here of two, in the other of which both losses have the gradient (3, -4)."""
    monkeypatch.setattr("support.losses.average_over_processes",
                        lambda gradient: (gradient + torch.tensor([3.0, -4.0])) / 2)
    weight = torch.ones(2, requires_grad=True)
    losses = weight @ torch.tensor([3.0, 4.0]), weight @ torch.tensor([1.0, 0.0])
    found = balance(*losses, weight, torch.tensor(1.0))
    assert found.item() == pytest.approx(3 / 8**0.5)   # of (3, 0) and (2, -2)


def test_edges_are_to_be_as_steep():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 2, 3, 5, 4))
    errors = [np.abs(np.abs(np.diff(y, axis=axis)) - np.abs(np.diff(x, axis=axis))).mean()
              for axis in (2, 3)]
    found = edge_loss(torch.from_numpy(x), torch.from_numpy(y))
    assert found.item() == pytest.approx(np.mean(errors))
    assert edge_loss(torch.from_numpy(x), torch.from_numpy(1 - x)) < 1e-12


# In training


def test_a_step_adds_the_losses_up(tmp_path):
    stage = detailed_stage(tmp_path)
    stage.begin()
    torch.manual_seed(0)
    model = stage.model.train()
    model.quantizer.start_from(torch.randn(16, 4, 4, 4))
    stage.step = 6
    images, labels = batch(stage)
    total, to_log = stage.loss(model, images, labels)
    losses = to_log()
    x = to_float(images)
    y = model(x)[0]
    discriminator = stage.helpers.discriminator
    classifier = stage.helpers.classifier
    perceptual = perceptual_distance(classifier.maps(x), classifier.maps(y))
    likeness = (x - y).square().mean() + 0.2 * (x - y).abs().mean()
    likeness = likeness + 0.5 * edge_loss(x, y) + 0.1 * perceptual
    reward = -discriminator(y).mean()
    weight = 0.4 * balance(likeness, reward, model.decoder.conv_out.weight, torch.tensor(1.0))
    own, right = discriminator.loss(x, y)
    torch.testing.assert_close(total, likeness + losses["codebook"] + weight * reward + own)
    assert losses["discriminator_right"] == right
    codes = model.quantizer.codebook_VC   # no other loss moves it
    for gradients in zip(*(torch.autograd.grad(x, [codes], retain_graph=True)
                           for x in (total, losses["codebook"]))):
        torch.testing.assert_close(*gradients)
    torch.testing.assert_close(losses["balance"], weight)
    torch.testing.assert_close(losses["discriminator"], own)
    stage.step = 5   # before the discriminator comes in
    total, to_log = stage.loss(model, images, labels)
    torch.testing.assert_close(total, likeness + to_log()["codebook"])
    assert "discriminator" not in to_log()


def test_the_classifier_is_not_the_one_that_judges(tmp_path, monkeypatch):
    """Else the tokenizer would be trained on what it is judged by."""
    seeds = []

    def noted(images, labels, shape, seed, device):
        seeds.append(seed)
        return train_classifier(images, labels, shape, seed, device)

    monkeypatch.setattr("support.losses.train_classifier", noted)
    monkeypatch.setattr("support.evaluation.train_classifier", noted)
    stage = detailed_stage(tmp_path)
    stage.begin()
    images, labels = stage.data.train.tensors
    save_checkpoint(tmp_path / "train_images.pt", "set of training images", images=images,
                    labels=labels, side=8, data_set="random")
    judging = kept_classifier(
        SimpleNamespace(folder=tmp_path, classes=stage.data.classes, machine=FP32, data_set=None))
    assert len(set(seeds)) == 2
    learned = stage.helpers.classifier
    assert learned.head.weight.shape == judging.head.weight.shape
    assert not torch.equal(learned.head.weight, judging.head.weight)
    assert not learned.training   # or its norms would follow the batch
    assert not any(p.requires_grad for p in learned.parameters())


def test_micro_batches_have_the_discriminator_s_mean_gradient(tmp_path):
    gradients = []
    for count in (1, 2):
        values = dict(tokenizer_steps=1, adversarial_from=0.0)
        stage = detailed_stage(tmp_path / str(count), values=values, grad_accumulation=count)
        stage.run()
        gradients.append([p.grad for p in stage.helpers.discriminator.parameters()])
    for one, two in zip(*gradients):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-6)


def test_the_discriminator_s_gradient_is_averaged_over_processes(tmp_path, monkeypatch):
    """With another process, whose gradient is 0, it is half. (The model's are DDP's to average.)"""
    norms, lengths = [], set()
    clip = train.clip_grad_norm_

    def noted(weights, length):
        lengths.add(length)
        norms.append(clip(weights, length))
        return norms[-1]

    monkeypatch.setattr(train, "clip_grad_norm_", noted)
    values = dict(tokenizer_steps=1, adversarial_from=0.0, perceptual_weight=0.0)
    for share in (1.0, 0.5):
        monkeypatch.setattr(train, "average_over_processes", lambda x: x.mul_(share))
        detailed_stage(tmp_path / str(share), values=values).run()
    assert lengths == {1.0}   # neither is longer after it
    model, discriminator, its_model, its_discriminator = norms
    torch.testing.assert_close(its_model, model)
    torch.testing.assert_close(its_discriminator, discriminator / 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_with_all_losses(tmp_path, dtype):
    machine = Machine(torch.device("cpu"), dtype)
    detailed_stage(tmp_path, machine, values=dict(tokenizer_steps=2, adversarial_from=0.0)).run()
    line = read_log(tmp_path / "log.jsonl")[0]
    assert all(math.isfinite(line[name]) for name in ("loss", "perceptual", "adversarial"))


def test_a_discriminator_s_gradient_that_is_no_number_is_never_saved(tmp_path):
    stage = detailed_stage(tmp_path, checkpoint_every=1)
    weight = stage.helpers.discriminator.conv_out.weight
    loss = stage.loss

    def spoiled(*arguments):
        total, to_log = loss(*arguments)
        if stage.step == 7:
            total = total + 0 * (weight * 0).sum().sqrt()
        return total, to_log

    stage.loss = spoiled
    told = "at step 8 .* gradient nan .* the last good checkpoint, of step 7"
    with pytest.raises(UserError, match=told):
        stage.run()
    saved = torch.load(stage.path, weights_only=True)["training"]
    assert saved["step"] == 7 and all(x.isfinite().all() for x in saved["helpers"].values())


def test_the_discriminator_has_a_short_memory(tmp_path):
    (optimizer,) = detailed_stage(tmp_path).helpers.optimizers()
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (1.5e-3, (0.5, 0.9), 0.0)
    assert not detailed_stage(tmp_path, values=dict(adversarial_weight=0.0)).helpers.optimizers()


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A tokenizer trained with all losses without a stop."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("support.evaluation.CLASSIFIER_STEPS", 3)
        detailed_stage(out).run()
    return out


def test_stopped_and_resumed_equals_uninterrupted(whole, tmp_path, monkeypatch):
    for step in (4, 10):   # before the discriminator comes in, and after
        stage = detailed_stage(tmp_path, checkpoint_every=3, resume=step > 4)
        loss = stage.loss

        def fails(*arguments):
            if stage.step == step:
                raise Killed
            return loss(*arguments)

        stage.loss = fails
        with pytest.raises(Killed):
            stage.run()
        monkeypatch.setattr("support.losses.train_classifier", None)   # it is in the checkpoint
    with pytest.raises(UserError, match="--perceptual-weight 0.1 and not 0.2"):
        detailed_stage(tmp_path, values=dict(perceptual_weight=0.2), resume=True).run()
    detailed_stage(tmp_path, resume=True).run()
    assert (tmp_path / "log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes()
    ours, its = (torch.load(out / "tokenizer.pt", weights_only=True) for out in (tmp_path, whole))
    assert all(torch.equal(ours["model"][name], value) for name, value in its["model"].items())
    assert "training" not in its and not any("classifier" in name for name in its["model"])


def test_what_is_logged_and_drawn(whole):
    log = read_log(whole / "log.jsonl")
    lines = [line for line in log if line["split"] == "train"]
    assert ["discriminator" in line for line in lines] == [False, True]   # of steps 1 and 11
    for name in ("adversarial", "balance", "discriminator_right", "perceptual"):
        assert isinstance(lines[1][name], float)
    measured = [line for line in log if line["split"] == "held_out"]
    assert all(0 <= line["discriminator_right"] <= 1 for line in measured)
    figure = draw_curves(log, (1, 2, 4))
    titles = [axis.get_title() for axis in figure.axes]
    assert "weight of the adversarial loss" in titles
    of_scales = figure.axes[titles.index("tokenizer: PSNR after each scale, dB")]
    assert {axis.get_xlabel() for axis in figure.axes if axis is not of_scales} == {"step"}
    assert of_scales.get_xlabel() == "scale"
    drawn = {line.get_label(): list(line.get_ydata()) for axis in figure.axes
             for line in axis.lines}
    assert drawn["weight"] == [lines[1]["balance"]]   # the first line has none
    assert drawn["perceptual distance"][0] == lines[0]["perceptual"]
    assert drawn["from all scales"] == [line["psnr"] for line in measured]
    health = log[-1]
    assert drawn["trained, held-out images"] == health["psnr_per_scale"]


def test_curves_are_of_what_is_logged_so_far():
    """A panel as soon as there is something of it, three in a row."""
    trained = dict(stage="tokenizer", split="train", mse=0.1, codebook=0.0)
    measured = dict(stage="tokenizer", split="held_out", psnr=20.0)
    log = [dict(trained, step=1), dict(measured, step=4)]
    titles = ["tokenizer: errors in training", "tokenizer: PSNR of held-out images, dB"]
    shown = draw_curves(log, (1, 2)).axes
    assert [axis.get_title() for axis in shown] == titles
    assert [axis.get_yscale() for axis in shown] == ["log", "linear"]
    for split in ("train", "held_out"):
        log.append(dict(stage="var", split=split, step=1, loss=2.0, loss_per_scale=[3.0, 1.0]))
        rows = draw_curves(log, (1, 2)).axes[0].get_gridspec().nrows
        assert rows == (1 if split == "train" else 2)
    shown = draw_curves(log, (1, 2)).axes
    assert [axis.get_title() for axis in shown] == [
        *titles, "transformer: loss, nats a token", "transformer: held-out loss of each scale"]
    legends = [[line.get_label() for line in axis.lines] for axis in shown]
    assert legends == [["squared error", "codebook loss"], ["from all scales"],
                       ["training images", "held-out images"], ["1x1", "2x2"]]
    assert [line.get_ydata().tolist() for line in shown[3].lines] == [[3.0], [1.0]]


def test_held_out_losses_are_means_over_images(tmp_path, monkeypatch):
    stage = detailed_stage(tmp_path)
    sizes = []
    loss = stage.helpers.discriminator.loss

    def seen(originals, reconstructions):
        sizes.append(len(originals))
        return loss(originals, reconstructions)

    monkeypatch.setattr(stage.helpers.discriminator, "loss", seen)
    whole = stage.validate()
    monkeypatch.setattr("train.at_a_time", lambda side: 4)
    parts = stage.validate()
    assert sizes == [10, 4, 4, 2]   # of ten images
    sizes.clear()
    few, stage.unseen = stage.unseen, stage.unseen.repeat(26, 1, 1, 1)
    stage.validate()
    assert sum(sizes) == 256   # at most
    stage.unseen = few
    assert parts == pytest.approx(whole, rel=1e-4)
    reconstructions, losses = stage.ema(stage.unseen)
    right = loss(stage.unseen, reconstructions)[1].item()
    assert whole["psnr"] == pytest.approx(10 * np.log10(4 / losses["mse"].item()), rel=1e-4)
    assert whole["discriminator_right"] == pytest.approx(right)


# LPIPS


class Stub(ModuleType):
    """The package, with one convolution of VGG's."""

    class LPIPS(nn.Module):
        def __init__(self, net, pnet_rand, verbose):
            super().__init__()
            assert net == "vgg" and pnet_rand   # or it would download the weights
            self.net = nn.ModuleDict({"slice2": nn.ModuleDict({"5": nn.Conv2d(3, 4, 3)})})

        def forward(self, x, y):
            conv = self.net["slice2"]["5"]
            return (conv(x) - conv(y)).square().mean(dim=(1, 2, 3), keepdim=True)


def test_lpips_is_loaded_from_the_weights_of_vgg(tmp_path, monkeypatch):
    path = tmp_path / "vgg.pth"
    state = {"features.5.weight": torch.randn(4, 3, 3, 3), "features.5.bias": torch.randn(4)}
    torch.save(state, path)
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(UserError, match="pip install lpips torchvision"):
        load_lpips(path)
    monkeypatch.setitem(sys.modules, "lpips", Stub("lpips"))
    with pytest.raises(UserError, match="is not torchvision's vgg16-397923af.pth"):
        load_lpips(path)
    monkeypatch.setattr("support.losses.VGG_SHA256", "")
    monkeypatch.setattr("support.losses.VGG_URL", path.rename(tmp_path / "elsewhere.pth").as_uri())
    losses = DetailLosses(DETAILED, 3, 2, path)   # downloads it
    assert not any("lpips" in name or "classifier" in name for name in losses.state_dict())
    conv = nn.Conv2d(3, 4, 3)
    conv.load_state_dict({"weight": state["features.5.weight"], "bias": state["features.5.bias"]})
    x, y = torch.randn(2, 2, 3, 8, 8)
    torch.testing.assert_close(losses.distance(x, y), (conv(x) - conv(y)).square().mean())
    assert not any(p.requires_grad for p in load_lpips(path).parameters())
    found = [detailed_stage(tmp_path, lpips_weights=weights).made_with for weights in (path, None)]
    assert [made_with["LPIPS"] for made_with in found] == [True, False]   # for --resume to compare
    del state["features.5.bias"]
    torch.save(state, path)
    with pytest.raises(UserError, match="vgg.pth cannot be read"):
        load_lpips(path)


def test_the_loss_of_the_tokenizer_is_not_drawn_as_the_transformer_s():
    log = [dict(stage="tokenizer", split="train", step=1, loss=9.0, mse=0.1),
           dict(stage="var", split="train", step=1, loss=2.0)]
    _, transformer = draw_curves(log, (1, 2)).axes
    assert [line.get_ydata().tolist() for line in transformer.lines] == [[2.0]]


def test_the_classifier_of_the_losses_is_for_the_side_of_the_images():
    for side in (8, 64):
        assert DetailLosses(replace(DETAILED, image_size=side), 3, 2).shape["side"] == side


def test_lpips_is_without_its_dropout(tmp_path, monkeypatch):
    state = {"features.5.weight": torch.randn(4, 3, 3, 3), "features.5.bias": torch.randn(4)}
    torch.save(state, tmp_path / "vgg.pth")
    monkeypatch.setitem(sys.modules, "lpips", Stub("lpips"))
    monkeypatch.setattr("support.losses.VGG_SHA256", "")
    assert not load_lpips(tmp_path / "vgg.pth").training


def test_curves_lie_above_their_steps_and_are_called_what_they_are():
    log = [dict(stage="tokenizer", split="train", step=step, mse=0.1, discriminator=0.5 + step, discriminator_right=0.75,
                balance=2.0) for step in (1, 11, 31)]
    lines = {line.get_label(): line for axis in draw_curves(log, (1, 2)).axes for line in axis.lines}
    for name, values in (("squared error", [0.1] * 3), ("its loss", [1.5, 11.5, 31.5]),
                         ("share of patches right", [0.75] * 3), ("weight", [2.0] * 3)):
        assert lines[name].get_xdata().tolist() == [1, 11, 31] and lines[name].get_ydata().tolist() == values
