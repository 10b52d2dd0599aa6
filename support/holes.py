"""What is known of images of which the rest is to be generated, and how good the rest becomes."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from support.cli import UserError
from support.evaluation import Judge, kept_classifier, say_qualities
from support.images import read_mask


def known_pixels(
    hole: Path | Sequence[float], side: int, outside: bool = True, cells: int | None = None
) -> Tensor:
    """1 where an image is known and 0 where it is not: float [side, side].

    hole: the file of a mask, in which it is painted, or a box (y0, x0, y1, x1) in fractions of the
    side. outside: whether what is outside the box is known, or what is inside. cells: the side of
    the last map, as many as pixels if it is None. Raises UserError where there is no hole, or none
    that would be drawn, and where there is nothing else.
    """
    if isinstance(hole, Path):
        name = hole
        known_HW = torch.from_numpy(~read_mask(hole, side)).float()
    else:
        name = f"--box {' '.join(map(str, hole))}"
        edges = [round(fraction * side) for fraction in hole]
        y0, x0, y1, x1 = edges
        if y0 >= y1 or x0 >= x1:
            raise UserError(f"{name} holds no pixel: Y0 X0 are its upper left corner, and Y1 X1 "
                            f"its lower right one")
        known_HW = torch.full((side, side), float(outside))
        known_HW[y0:y1, x0:x1] = float(not outside)
    if known_HW.min() == known_HW.max():
        lacks = "a hole" if known_HW.max() else "anything that is known"
        raise UserError(f"{name} leaves {side} x {side} pixels without {lacks}")
    shares_1ss = F.adaptive_avg_pool2d(known_HW[None], cells or side)
    if shares_1ss.min() >= 0.5:   # see `Known.mask`
        raise UserError(f"{name} is a hole too small to be drawn: of no cell of the last map, "
                        f"{side // cells} x {side // cells} pixels, it has more than half")
    return known_HW


def share_of_known(known_HW: Tensor, paste: bool) -> float:
    """How much of a cell has to be known if it is to count as known on coarse maps that are drawn
    in the hole, too.

    Of a known middle each cell of the 2x2 map has a quarter; if half were asked, no coarse map
    would tell its colours. Of known edges a quarter would tell that the middle is like them.
    """
    surrounded = known_HW[1:-1, 1:-1].sum() == known_HW.sum()
    share = 0.25 if surrounded else 0.5
    if F.adaptive_avg_pool2d(known_HW[None], 2).max() < share and not paste:
        print("note: on the coarsest maps so small a part does not count as known, and may drift; "
              "--paste puts it back")
    return share


def from_small(
    images: Tensor, small_side: int | None, config
) -> tuple[Tensor, int]:
    """What upscaling starts from: small images, enlarged; and how many scales they are.

    small_side: half of the images', if it is None. config: a TokenizerConfig.
    """
    side = small_side or config.image_side // 2
    if side >= config.image_side:
        raise UserError(f"--small {side} must be less than the side of the images, "
                        f"{config.image_side}")
    small = F.interpolate(images, size=(side, side), mode="area")
    large = F.interpolate(small, size=images.shape[2:], mode="bicubic")
    scales = sum(s * config.downsampling <= side for s in config.scales)
    return large.clamp(-1, 1), max(1, scales)


def say_completion(results: list[Tensor], images: Tensor, known_HW: Tensor) -> None:
    """Print how far the known part drifted and the hole strays, and whether its border shows."""
    results = torch.stack(results)   # [seeds, N, channels, side, side]
    errors = (results - images) / 2
    error_HW = errors.square().mean(dim=(0, 1, 2))
    drift = error_HW[known_HW > 0].mean().item()
    strays = error_HW[known_HW == 0].mean().item()
    own = seam(images, known_HW)
    seen = seam(results.flatten(0, 1), known_HW)
    share = f", {seen / own:.2f} of the image's own" if own else ""
    print(f"mean squared error (pixels in [0, 1]): known part {drift:.5f}, hole {strays:.5f}; "
          f"mean step of pixels across the border {seen:.4f}{share}")


def seam(images: Tensor, known_HW: Tensor) -> float:
    """How much the border of what is known shows, where known_HW is 1 and not 0: the mean absolute
    difference between neighbours across it; 0 if there are none."""
    steps = []
    for axis in (-1, -2):
        across_HW = known_HW.diff(dim=axis) != 0
        differences = images.diff(dim=axis)[..., across_HW] / 2
        steps.append(differences.abs().flatten())
    steps = torch.cat(steps)
    return steps.mean().item() if len(steps) else 0.0


def judge_of(run, given) -> Judge:
    """What measures completions of held-out images. run: a sample.Run; given: an asked.Given.

    Raises UserError for few images, and for others, whose classes nobody knows.
    """
    if None in given.labels or len(given.labels) < 12:
        raise UserError("--judge needs held-out images, data:0 and so on, a dozen or more")
    return Judge(kept_classifier(run), given.images, run.classes)


def judge_completions(judge: Judge, own: list[int], asked: int, results: list[Tensor]) -> None:
    """Print how good completions are, a set of them for each seed.

    own: the images' classes. asked: the class to complete them towards; the null class is each
    image's own.
    """
    labels = torch.tensor(own)
    if asked < len(judge.classes):
        labels = torch.full_like(labels, asked)
    say_qualities({"completions": [judge(images, labels) for images in results]})
