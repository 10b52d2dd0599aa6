"""The published checkpoints of VAR (github.com/FoundationVision/VAR): what is called how in them.

They have no config, but all that one would say, except the sides of a tokenizer's token maps, can
be read off names and shapes. `tokenizer_of` and `transformer_of` return the values of a config and
the state dict under our names, for the two `from_official` to make models of.
"""
from __future__ import annotations

import contextlib
import math
import re
from pathlib import Path

import torch
from torch import Tensor

from support.checkpoint import download
from support.cli import in_short

# The files that the authors' README links to, as they are since May 2024. The SHA-256 are those of
# Hugging Face's LFS pointers; the pages with those of d24 and d30 were not to be had, and they are
# as recorded in github.com/amy499/var-scale-audit (configs), which agrees in the other files.
URL = ("https://huggingface.co/FoundationVision/var/resolve/"
       "6d0ee6598a42f75079aa79e58b012b57b284c91b/")
FOLDER = Path("data/published")
TOKENIZER_FILE = "vae_ch160v4096z32.pth"
FILES = {
    TOKENIZER_FILE: "7c3ec27ae28a3f87055e83211ea8cc8558bd1985d7b51742d074fb4c2fcf186c",
    "var_d16.pth": "4f6151aad91c94e03e224dd7358d8389fa05301c0c291279566998efb54b0ecb",
    "var_d20.pth": "f7d232978e6fe82a4f2e0f5d82b012e01b1aa5abfe93ce2b56104ec0e878a10f",
    "var_d24.pth": "12c03619b2d3906ed19fe59539a90aadf60d72287dbaa31cf540435e76ddf789",
    "var_d30.pth": "7b11551dd4d794c7d6ed10b3d2822d42efe609a86128171b646e543dd2633b56",
    "var_d36.pth": "660201c829c6f7b775b9119867c12c11aaa68c72770dc33653eec1fa67e27d4d",
}

PUBLISHED_SCALES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)   # of the 256-pixel models

TOKENIZER_NAMES = {   # published name: ours, applied in this order
    r"\.(down|up)\.(\d+)\.(downsample|upsample)\.conv\.": r".levels.\2.resample.",
    r"\.(down|up)\.(\d+)\.block\.": r".levels.\2.blocks.",
    r"\.(down|up)\.(\d+)\.attn\.": r".levels.\2.attentions.",
    r"\.mid\.block_1\.": ".middle.0.",
    r"\.mid\.attn_1\.": ".middle.1.",
    r"\.mid\.block_2\.": ".middle.2.",
    r"\.nin_shortcut\.": ".shortcut.",
    r"\.proj_out\.": ".out.",
    r"^quant_conv\.": "to_latent.",
    r"^post_quant_conv\.": "from_latent.",
    r"^quantize\.embedding\.weight$": "quantizer.codebook_VC",
    r"^quantize\.quant_resi\.qresi_ls\.": "quantizer.phis.",   # several, of neighbouring scales
    r"^quantize\.quant_resi\.qresi\.": "quantizer.phis.0.",    # one for all scales
    r"^quantize\.quant_resi\.(\d)": r"quantizer.phis.\1",      # one for each scale
}

TRANSFORMER_NAMES = {
    r"^class_emb\.": "class_embedding.",
    r"^word_embed\.": "code_embedding.",
    r"^pos_start$": "start_position_11W",
    r"^pos_1LC$": "position_1LW",
    r"^lvl_embed\.": "level_embedding.",
    r"^shared_ada_lin\.1\.": "shared_modulation.",
    r"^head_nm\.ada_lin\.1\.": "head_modulation.",
    r"\.ada_lin\.1\.": ".modulation.",
    r"\.ada_gss$": ".modulation_offset_6W",
    r"\.attn\.mat_qkv\.": ".attention.qkv.",
    r"\.attn\.proj\.": ".attention.out.",
    r"\.attn\.scale_mul_1H11$": ".attention.log_scale_H11",
    r"\.attn\.": ".attention.",
    r"\.ffn\.fc1\.": ".mlp.0.",
    r"\.ffn\.fc2\.": ".mlp.2.",
}


def published_pair(model: str) -> list[Path]:
    """The authors' tokenizer and one of their transformers, "d16" say, downloaded if not there."""
    paths = [FOLDER / name for name in (TOKENIZER_FILE, f"var_{model}.pth")]
    for path in paths:
        if not path.exists():
            download(URL + path.name, path, FILES[path.name])
    return paths


def class_names(count: int) -> list[str]:
    """ImageNet's, if there are so many and torchvision is installed; else numbers."""
    if count == 1000:
        # RuntimeError: torchvision is there, but of another PyTorch
        with contextlib.suppress(ImportError, RuntimeError):
            from torchvision.models import ResNet18_Weights
            return ResNet18_Weights.DEFAULT.meta["categories"]
    return [str(label) for label in range(count)]


def tokenizer_of(content: dict, scales: tuple[int, ...] | None = None) -> tuple[dict, dict]:
    """(values of a TokenizerConfig, state dict) of a published tokenizer.

    scales: the tensors tell only how many there are. Ten are taken for those of the 256-pixel
        models, any other number K for 1..K, unless they are given.
    """
    state = renamed(unwrapped(content, "tokenizer", "quantize.embedding.weight"), TOKENIZER_NAMES)
    V, C = state["quantizer.codebook_VC"].shape
    K = len(state.pop("quantize.ema_vocab_hit_SV"))   # of its training: only K is of use
    state["quantizer.hits_V"] = torch.ones(V)
    if scales is None:
        scales = PUBLISHED_SCALES if K == len(PUBLISHED_SCALES) else range(1, K + 1)
    width, image_channels = state["encoder.conv_in.weight"].shape[:2]
    levels = range(modules_under("encoder.levels.", state))
    widths = [len(state[f"encoder.levels.{i}.blocks.0.conv1.bias"]) for i in levels]
    values = dict(
        scales=tuple(scales),
        vocabulary=V,
        code_channels=C,
        image_channels=image_channels,
        width=width,
        multipliers=tuple(w // width for w in widths),
        blocks=modules_under("encoder.levels.0.blocks.", state),
        phis=modules_under("quantizer.phis.", state),
        norm_groups=32,
    )
    return values, state


def transformer_of(content: dict) -> tuple[dict, dict]:
    """(values of a VARConfig, state dict) of a published transformer."""
    published = unwrapped(content, "transformer", "pos_1LC")
    sizes = published["lvl_1L"].flatten().bincount().tolist()   # tokens of each scale
    state = {}
    for name, tensor in renamed(published, TRANSFORMER_NAMES).items():
        if name.endswith("log_scale_H11"):
            tensor = tensor.flatten(0, 1)
        if name.endswith("modulation_offset_6W"):
            tensor = tensor.flatten(0, 2)
        if not name.endswith(("lvl_1L", "attn_bias_for_masking", "zero_k_bias")):   # constants
            state[name] = tensor
    W, C = state["code_embedding.weight"].shape
    depth = modules_under("blocks.", state)
    log_scale_H11 = state.get("blocks.0.attention.log_scale_H11")
    values = dict(
        scales=tuple(map(math.isqrt, sizes)),
        vocabulary=len(state["head.bias"]),
        code_channels=C,
        classes=len(state["class_embedding.weight"]) - 1,
        depth=depth,
        width=W,
        heads=W // 64 if log_scale_H11 is None else len(log_scale_H11),
        shared_adaln="shared_modulation.weight" in state,
        normalise_qk=log_scale_H11 is not None,
        label_dropout=0.1,   # this and the next two: as published
        drop_path=0.1 * depth / 24,
        last_scales=None,
    )
    return values, state


def unwrapped(content: dict, what: str, landmark: str) -> dict[str, Tensor]:
    """The state dict inside what a file holds: the first dict in which a name ends in the landmark.

    The published files are such a dict. The authors' training puts it into {"trainer":
    {"var_wo_ddp": ..., "vae_local": ...}}, others into {"state_dict": ...}; DDP puts "module." in
    front of every name, torch.compile "_orig_mod.". Whatever stands before the landmark is taken
    off, and names without it are of another model. Raises ValueError.
    """
    if not isinstance(content, dict):
        content = {type(content).__name__: content}   # to be told what it is
    found = [content]
    for inside in found:   # which grows: the outer dicts come first
        state = {str(name).replace("_orig_mod.", ""): value for name, value in inside.items()}
        for name in state:
            if f".{name}".endswith(f".{landmark}"):
                prefix = name.removesuffix(landmark)
                own = [name for name in state if name.startswith(prefix)]
                return {name.removeprefix(prefix): state[name] for name in own}
        found += [value for value in state.values()
                  if isinstance(value, dict) and all(value is not other for other in found)]
    if "kind" in content:
        raise ValueError(f"not a published VAR {what} but of train.py, whose names end in .pt")
    holds = in_short(", ".join(map(str, content)), 60) or "{}"
    raise ValueError(f"not a published VAR {what}: it has no {landmark} but holds {holds}")


def renamed(state: dict[str, Tensor], table: dict[str, str]) -> dict[str, Tensor]:
    ours = {}
    for name, tensor in state.items():
        for pattern, replacement in table.items():
            name = re.sub(pattern, replacement, name)
        ours[name] = tensor
    return ours


def modules_under(prefix: str, state: dict[str, Tensor]) -> int:
    """How many numbered modules a state dict has under a name that ends in a dot."""
    under = [name.removeprefix(prefix) for name in state if name.startswith(prefix)]
    return len({name.split(".")[0] for name in under})
