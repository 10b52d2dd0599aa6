"""The published implementation's numbers, reproduced from deterministic weights (tests/golden/weights.py)."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from golden import weights
from tokenizer import Tokenizer
from var import VAR

GOLDEN = Path(__file__).parent / "golden"


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
