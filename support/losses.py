"""Losses that keep detail in the tokenizer's reconstructions, and the balance of two of them.

Where the latent does not tell what a patch of grass looks like in detail, the least squared error
is that of the mean of all it could be: a blur. Two other losses ask for detail. A perceptual
distance compares what a network that knows images makes of original and reconstruction. And a
discriminator, trained at the same time, tells the two apart; the tokenizer is rewarded where it
fails to.
"""
from __future__ import annotations

import hashlib
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.checkpoint import blaming, download
from support.cli import UserError, in_short
from support.devices import average_over_processes, copy_from_first
from support.evaluation import Classifier, train_classifier
from support.presets import TokenizerPreset

VGG_SHA256 = "397923af"   # how it begins
VGG_URL = f"https://download.pytorch.org/models/vgg16-{VGG_SHA256}.pth"


def edge_loss(x: Tensor, y: Tensor) -> Tensor:
    """mean | |dy| - |dx| |, d being the step between neighbouring pixels. Squared error is least
    where an uncertain edge is blurred; this one asks for steps as large as the original's."""
    errors = [F.l1_loss(y.diff(dim=axis).abs(), x.diff(dim=axis).abs()) for axis in (2, 3)]
    return sum(errors) / 2


class DetailLosses(nn.Module):
    """Both losses, each where the preset gives it a weight, with the networks they need."""

    def __init__(self, preset: TokenizerPreset, image_channels: int, classes: int,
                 lpips_weights: Path | None = None):
        """lpips_weights: LPIPS is the perceptual distance, and not a classifier of the images."""
        super().__init__()
        self.preset = preset
        self.lpips = []   # a list, so that its weights are no part of a checkpoint
        if preset.adversarial_weight:
            self.discriminator = Discriminator(image_channels, preset.discriminator_width)
        if preset.perceptual_weight and lpips_weights:
            self.lpips = [load_lpips(lpips_weights)]
        elif preset.perceptual_weight:
            self.shape = {"channels": image_channels, "side": preset.image_size, "classes": classes}
            self.classifier = Classifier(**self.shape).eval().requires_grad_(False)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The discriminator's. Its memory is short, as usual: its opponent changes all the time."""
        if not self.preset.adversarial_weight:
            return []
        return [torch.optim.AdamW(
            self.discriminator.parameters(), self.preset.discriminator_lr, betas=(0.5, 0.9),
            weight_decay=0.0, fused=True)]

    def learn(self, images: Tensor, labels: Tensor) -> None:
        """Train the classifier, on other draws than that by which sample.py judges the results.
        Raises UserError for a single class."""
        if self.shape["classes"] == 1:
            raise UserError("the perceptual distance is that of a classifier, to which one class "
                            "gives nothing to learn; --perceptual-weight 0 leaves it out, "
                            "--perceptual takes LPIPS")
        device = self.classifier.head.weight.device
        trained = train_classifier(images, labels, self.shape, 1, device)
        self.classifier.load_state_dict(trained.state_dict())
        for value in self.classifier.state_dict().values():   # each GPU may round otherwise
            copy_from_first(value)

    def forward(self, originals: Tensor, reconstructions: Tensor, reconstruction_loss: Tensor,
                last_layer: Tensor, adversarial: bool, scale: Tensor
                ) -> tuple[Tensor, dict[str, Tensor]]:
        """What to minimise in place of the pixels' reconstruction loss, and the losses by name.

        last_layer: the decoder's weight. adversarial: whether the discriminator takes part yet.
        scale: what the loss is multiplied by before its gradient is taken, see `LossScale`.
        """
        losses = {}
        if self.preset.perceptual_weight:
            losses["perceptual"] = self.distance(originals, reconstructions)
            weighted = self.preset.perceptual_weight * losses["perceptual"]
            reconstruction_loss = reconstruction_loss + weighted
        if not self.preset.adversarial_weight or not adversarial:
            return reconstruction_loss, losses
        adversarial_loss = self.discriminator.adversarial_loss(reconstructions)
        weight = self.preset.adversarial_weight * balance(
            reconstruction_loss, adversarial_loss, last_layer, scale)
        own_loss, right = self.discriminator.loss(originals, reconstructions)
        losses |= {"adversarial": adversarial_loss, "balance": weight, "discriminator": own_loss,
                   "discriminator_right": right}
        # One backward pass for both: neither loss has a gradient for the other's weights.
        return reconstruction_loss + weight * adversarial_loss + own_loss, losses

    def distance(self, originals: Tensor, reconstructions: Tensor) -> Tensor:
        if self.lpips:
            lpips = self.lpips[0].to(originals.device)
            return lpips(originals, reconstructions).mean()
        maps = self.classifier.maps
        return perceptual_distance(maps(originals), maps(reconstructions))

    def held_out(self, originals: Tensor, reconstructions: Tensor) -> dict[str, Tensor]:
        """What is measured of held-out images."""
        if not self.preset.adversarial_weight:
            return {}
        _, right = self.discriminator.loss(originals, reconstructions)
        return {"discriminator_right": right}


def perceptual_distance(maps_x: list[Tensor], maps_y: list[Tensor]) -> Tensor:
    """How differently a network sees two batches of images (arXiv 1801.03924, Eq. 1, weights 1).

        sum over levels of the mean over places of |x / |x| - y / |y||^2     (over channels)

    maps_x, maps_y: the network's feature maps of either batch, [B, channels, H, W] for each level.
    """
    total = 0.0
    for x_BCHW, y_BCHW in zip(maps_x, maps_y):
        x_BCHW = F.normalize(x_BCHW.float(), dim=1, eps=1e-3)
        y_BCHW = F.normalize(y_BCHW.float(), dim=1, eps=1e-3)
        total = total + (x_BCHW - y_BCHW).square().sum(dim=1).mean()
    return total


class Discriminator(nn.Module):
    """Tells patches of originals from patches of reconstructions: PatchGAN (arXiv 1611.07004).

    It gives a logit, above 0 for an original, to each of many overlapping patches 38 pixels wide,
    enough to judge texture.
    """

    def __init__(self, image_channels: int, width: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(image_channels, width, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, 2, 1),
            nn.GroupNorm(1, 2 * width),   # no image sees another
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 4 * width, 4, 2, 1),
            nn.GroupNorm(1, 4 * width),
            nn.LeakyReLU(0.2))
        self.conv_out = nn.Conv2d(4 * width, 1, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.layers(images)             # [B, 4 width, side / 8, side / 8]
        return self.conv_out(x).float()     # [B, 1, side / 8, side / 8]

    def loss(self, originals: Tensor, reconstructions: Tensor) -> tuple[Tensor, Tensor]:
        """The discriminator's own loss, and the share of patches it has right.

            1/2 [max(0, 1 - D(x)) + max(0, 1 + D(y))]       hinge loss: no more for right than 1

        It leaves the tokenizer alone.
        """
        logits_x = self(originals)
        logits_y = self(reconstructions.detach())
        loss_x = F.relu(1 - logits_x).mean()
        loss_y = F.relu(1 + logits_y).mean()
        right_x = (logits_x > 0).float().mean()
        right_y = (logits_y <= 0).float().mean()
        return (loss_x + loss_y) / 2, (right_x + right_y) / 2

    def adversarial_loss(self, reconstructions: Tensor) -> Tensor:
        """The tokenizer's loss, -D(y). It leaves the discriminator alone."""
        self.requires_grad_(False)
        loss = -self(reconstructions).mean()
        self.requires_grad_(True)
        return loss


def balance(
    reconstruction_loss: Tensor, adversarial_loss: Tensor, last_layer: Tensor, scale: Tensor
) -> Tensor:
    """The adversarial loss's weight, so that at the decoder's last layer it pulls as much as the
    other losses do (VQGAN, arXiv 2012.09841, Eq. 7). It is a tensor: nobody waits for its value.

        |gradient of reconstruction_loss| / (|gradient of adversarial_loss| + 1e-6)

    At most 10,000, since a discriminator that is sure has small gradients. These are of all
    processes, and of one micro-batch. Where one overflows, so that the step is to be left out, the
    weight is no number.
    """
    norms = []
    for loss in (reconstruction_loss, adversarial_loss):
        (gradient,) = torch.autograd.grad(loss * scale, last_layer, retain_graph=True)
        norms.append(average_over_processes(gradient).norm() / scale)
    weight = (norms[0] / (norms[1] + 1e-6)).clamp(max=1e4)
    return weight.masked_fill(~(norms[0] + norms[1]).isfinite(), math.nan)


def load_lpips(path: Path) -> nn.Module:
    """The field's perceptual distance, LPIPS (1801.03924), of two batches of images in [-1, 1].

    path: the weights of torchvision's VGG-16, downloaded if they are not there. Raises UserError
    for any other file, and where the packages are missing.
    """
    try:
        import lpips
    except ImportError as error:
        raise UserError(f"--perceptual needs two more packages, pip install lpips torchvision "
                        f"({in_short(error)})")
    if not path.exists():
        download(VGG_URL, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if not digest.startswith(VGG_SHA256):
        raise UserError(f"{path} is not torchvision's vgg16-{VGG_SHA256}.pth: its SHA-256 is "
                        f"another")
    with blaming(path), torch.no_grad():
        state = torch.load(path, map_location="cpu", weights_only=True)
        distance = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
        for name, parameter in distance.net.named_parameters():
            of_vgg = name.split(".", 1)[1]   # slice2.5.weight, of features.5.weight
            parameter.copy_(state[f"features.{of_vgg}"])
    return distance.eval().requires_grad_(False)
