"""The published implementation's numbers, reproduced from deterministic weights (tests/golden/weights.py)."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from golden import weights
from tokenizer import Tokenizer
from var import VAR

GOLDEN = Path(__file__).parent / "golden"
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def case():
    spec = json.loads((GOLDEN / "official_small.json").read_text())
    scales = tuple(spec["patch_nums"])
    state = {part: {name: torch.from_numpy(np.asarray(x)) for name, x in weights.fill(shapes, scales).items()}
             for part, shapes in spec["state_dict"].items()}
    expected = {name: torch.from_numpy(x) for name, x in np.load(GOLDEN / "official_small.npz").items()}
    return state, expected, spec["cfg"]


@pytest.fixture(scope="module")
def tokenizer(case):
    return Tokenizer.from_official(case[0]["vae"])


@pytest.fixture(scope="module")
def model(case):
    return VAR.from_official(case[0]["var"])


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@torch.no_grad()
def test_tokenizer(case, tokenizer):
    expected = case[1]
    batch, _, side, _ = expected["reconstruction"].shape
    images = torch.from_numpy(weights.image(batch, side))
    close(tokenizer.latent(images), expected["latent"], 1e-4)
    tokens_BL = tokenizer.encode(images)
    assert torch.equal(tokens_BL, expected["tokens"])
    close(tokenizer.teacher_inputs(tokens_BL), expected["teacher_input"], 1e-4)
    close(tokenizer.decode(tokens_BL), expected["reconstruction"], 1e-3)


@torch.no_grad()
def test_transformer(case, tokenizer, model):
    expected, cfg = case[1:]
    close(model(expected["labels"], expected["teacher_input"]), expected["logits"], 1e-3)
    tokens_BL = model.generate(tokenizer, expected["labels"], cfg=cfg, top_k=1)
    assert torch.equal(tokens_BL, expected["greedy_tokens"])
    close(tokenizer.decode(tokens_BL) / 2 + 0.5, expected["greedy_image"], 1e-3)


def test_published_files_are_sampled_from_as_downloaded(case, tmp_path):
    paths = {part: tmp_path / f"{part}.pth" for part in ("vae", "var")}
    for part, path in paths.items():
        torch.save(case[0][part], path)
    command = [sys.executable, ROOT / "sample.py", "--tokenizer", paths["vae"], "--var", paths["var"],
               "--classes", "2", "7", "--per-class", "2", "--out", tmp_path / "x.png"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "x.png") as image:
        assert image.height == 2 * 66 and len(np.unique(np.asarray(image))) > 20
    swapped = subprocess.run([*map(str, command), "--var", str(paths["vae"])], capture_output=True, text=True)
    assert swapped.returncode == 2 and "not a published VAR transformer" in swapped.stderr


def test_other_geometries_are_read_off_the_tensors():
    """Shared AdaLN, queries and keys as they are, other scales: names and shapes alone tell."""
    scales, W, V, C, depth = (1, 2, 4), 128, 16, 6, 3
    shapes = {"pos_start": [1, 1, W], "pos_1LC": [1, 21, W], "lvl_1L": [1, 21], "word_embed.weight": [W, C],
              "word_embed.bias": [W], "class_emb.weight": [6, W], "lvl_embed.weight": [3, W],
              "shared_ada_lin.1.weight": [6 * W, W], "shared_ada_lin.1.bias": [6 * W],
              "head_nm.ada_lin.1.weight": [2 * W, W], "head_nm.ada_lin.1.bias": [2 * W],
              "head.weight": [V, W], "head.bias": [V]}
    for i in range(depth):
        block = {"attn.q_bias": [W], "attn.v_bias": [W], "attn.zero_k_bias": [W], "attn.mat_qkv.weight": [3 * W, W],
                 "attn.proj.weight": [W, W], "attn.proj.bias": [W], "ffn.fc1.weight": [4 * W, W], "ffn.fc1.bias": [4 * W],
                 "ffn.fc2.weight": [W, 4 * W], "ffn.fc2.bias": [W], "ada_gss": [1, 1, 6, W]}
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    state = {name: torch.from_numpy(np.asarray(x)) for name, x in weights.fill(shapes, scales).items()}
    config = VAR.from_official(state).config
    assert (config.scales, config.depth, config.width, config.heads, config.vocabulary, config.classes) == (scales, 3, W, 2, V, 5)
    assert config.shared_adaln and not config.normalise_qk
