"""Small images as others leave them, and large ones made of them: for super-resolution.

How they are degraded is after Real-ESRGAN (arXiv 2107.10833), whose chain is gone through twice,
and has more kinds of each link: blur, a smaller side, noise, JPEG.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from papers.damage import saved
from sample import Known, Run
from support.holes import from_small
from support.images import Row, grid, to_bytes, to_float
from var import VAR

# How much, by strength: 0 is none, then weak, middle and strong.
BLUR = (0.0, 0.7, 1.4, 2.1)      # standard deviation, in pixels of the large image
NOISE = (0.0, 0.05, 0.1, 0.2)    # standard deviation, of pixels in [0, 1]
QUALITY = (100, 60, 30, 10)      # of JPEG; at 0 there is none
TESTS = {
    "none": (0, 0, 0),
    "blur and noise 2": (2, 2, 0),
    **{f"blur {x}": (x, 0, 0) for x in (1, 3)},
    **{f"noise {x}": (0, x, 0) for x in (1, 3)},
    **{f"JPEG {x}": (0, 0, x) for x in (1, 3)},
}
SHOWN = "blur and noise 2", "blur 3", "noise 3", "JPEG 3"   # in the picture


def degraded(images: Tensor, strengths: Sequence[int]) -> Tensor:
    """Of images [N, channels, side, side], on the CPU, small ones, of half the side.

    strengths: of blur, of noise and of JPEG, 0 to 3 each.
    """
    blur, noise, jpeg = strengths
    if blur:
        images = blurred(images, BLUR[blur])
    small = F.interpolate(images, scale_factor=0.5, mode="area")
    if noise:
        small = small + 2 * NOISE[noise] * torch.randn_like(small)
    return saved(small, "JPEG", QUALITY[jpeg]) if jpeg else small.clamp(-1, 1)


def blurred(images: Tensor, sigma: float) -> Tensor:
    """By a Gaussian, cut off at three standard deviations; at the border images are mirrored."""
    reach = math.ceil(3 * sigma)
    weights = torch.arange(-reach, reach + 1).div(sigma).square().div(-2).exp()
    weights = weights / weights.sum()
    pixels = images.flatten(0, 1).unsqueeze(1)   # every channel by itself
    pixels = F.pad(pixels, [reach] * 4, "reflect")
    for shape in ((1, 1, -1, 1), (1, 1, 1, -1)):
        pixels = F.conv2d(pixels, weights.view(shape))
    return pixels.view_as(images)


def degraded_by_lot(images: Tensor, choices: Sequence[Sequence[int]]) -> Tensor:
    """The same, where each image draws its strengths. choices: of blur, of noise and of JPEG."""
    drawn = [torch.tensor(some)[torch.randint(len(some), (len(images),))] for some in choices]
    strengths_N3 = torch.stack(drawn, dim=1)
    side = images.shape[-1] // 2
    small = images.new_empty(*images.shape[:2], side, side)
    for strengths in strengths_N3.unique(dim=0):
        alike_N = (strengths_N3 == strengths).all(dim=1)
        small[alike_N] = degraded(images[alike_N], strengths.tolist())
    return small


def enlarged(small: Tensor) -> Tensor:
    """Bicubic, to twice the side."""
    return F.interpolate(small, scale_factor=2, mode="bicubic").clamp(-1, 1)


class Looking(VAR):
    """A VAR that is shown a latent. With none, or Z at zero, it is the VAR it was made of."""

    def __init__(self, run: Run):
        super().__init__(run.model.config)
        self.load_state_dict(run.model.state_dict())
        self.read = run.tokenizer.quantizer.read
        self.look = nn.Linear(self.config.code_channels, self.config.width, bias=False)   # Z
        nn.init.zeros_(self.look.weight)
        self.shown_BLC: Tensor | None = None
        self.to(run.machine.device)

    def show(self, f_BCSS: Tensor) -> None:
        read = [self.read(f_BCSS, k) for k in range(len(self.config.scales))]
        self.shown_BLC = torch.cat(read, dim=1)

    def positions(self) -> Tensor:
        """What is added to what is read: [1, L, W], and with a latent [B, L, W]."""
        if self.shown_BLC is None:
            return super().positions()
        return super().positions() + self.look(self.shown_BLC)


def scales_of_small(run: Run) -> int:
    """How many scales an image of half the side can hold."""
    return from_small(to_float(run.held_out_images()[:1]), None, run.tokenizer.config)[1]


def upscaled(run: Run, latent_NCSS: Tensor) -> Tensor:
    """Large images: the coarse scales are those of the latents, the finer ones are drawn."""
    device = run.machine.device
    where_11SS = torch.ones_like(latent_NCSS[:1, :1]).to(device)
    scales = scales_of_small(run)

    def known(rows: slice) -> Known:   # called before these rows are drawn
        f_BCSS = latent_NCSS[rows].to(device)
        if isinstance(run.model, Looking):
            run.model.show(f_BCSS)
        return Known(f_BCSS, where_11SS, scales)
    return run.decode(run.generate([len(run.classes)] * len(latent_NCSS), 0, known))


def small_of(originals: Tensor, test: str) -> Tensor:
    """The small images of a test, the same ones every time."""
    torch.manual_seed(0)
    return degraded(originals, TESTS[test])


def large_of(run: Run, models: dict[str, VAR], small: Tensor) -> dict[str, Tensor]:
    """Images made of small ones, by what made them."""
    latent_NCSS, tokens_NL = run.encode(enlarged(small))
    made = {"bicubic": enlarged(small), "tokenizer": run.decode(tokens_NL)}
    for name, model in models.items():
        made[name] = upscaled(replace(run, model=model), latent_NCSS)
    return made


def picture_of(originals: Tensor, made: dict[str, dict[str, Tensor]]) -> Image.Image:
    """A row for each test that is shown, of another image each. made: by test, as `large_of`."""
    rows = []
    for i, test in enumerate(SHOWN):
        place = i * len(originals) // len(SHOWN)   # they are in the order of their classes
        columns = {"small": small_of(originals, test), **made[test], "original": originals}
        images = [to_bytes(x[place:place + 1])[0] for x in columns.values()]
        rows.append(Row(test, images, list(columns)))
    return grid(rows, 96)
