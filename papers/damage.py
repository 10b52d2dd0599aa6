"""What an image goes through before somebody encodes it: for watermarks, and super-resolution."""
from __future__ import annotations

import io

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sample import Run
from support.images import to_bytes, to_float


def read_back(run: Run, tokens_NL: Tensor, images: Tensor) -> dict[str, Tensor]:
    """Tokens of images that were saved, changed and saved again; and those that they were of."""
    x = saved(images)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    changed = {
        "saved": x,
        "JPEG 75": saved(x, "JPEG"),
        "noise 0.05": x + 0.1 * noise,   # 0.05 of pixels in [0, 1]
        "shift by 1": F.pad(x, (1, 0, 0, 0), "replicate")[..., :-1],
        "crop by 1": F.interpolate(
            x[..., 1:-1, 1:-1], x.shape[2:], mode="bicubic"),
        "regenerated": run.decode(run.encode(x)[1]),
    }
    read = {"never decoded": tokens_NL}
    for name, image in changed.items():
        read[name] = run.encode(saved(image))[1]
    return read


def saved(images: Tensor, form: str = "PNG", quality: int = 75) -> Tensor:
    """Images in [-1, 1] as they come out of a file. quality: of JPEG; a PNG loses nothing."""
    pixels_NHWC = to_bytes(images)
    for i, pixels in enumerate(pixels_NHWC):
        file = io.BytesIO()
        image = Image.fromarray(pixels.squeeze())
        image.save(file, form, quality=quality)
        pixels_NHWC[i] = np.asarray(Image.open(file)).reshape(pixels.shape)
    images = torch.from_numpy(pixels_NHWC)
    return to_float(images.permute(0, 3, 1, 2))
