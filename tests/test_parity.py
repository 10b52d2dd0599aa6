"""The published implementation's numbers, reproduced from deterministic weights (tests/golden/weights.py)."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import weights
from PIL import Image
from program import ran, refused

from support.published import PUBLISHED_SCALES, tokenizer_of, transformer_of
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


def test_published_files_are_sampled_from_as_downloaded(case, tmp_path):
    paths = {part: tmp_path / f"{part}.pth" for part in ("vae", "var")}
    for part, path in paths.items():
        torch.save(case[0][part], path)
    flags = ["--tokenizer", paths["vae"], "--classes", "2", "7", "--per-class", "2", "--out", tmp_path / "x.png"]
    ran("sample.py", "--var", paths["var"], *flags)
    with Image.open(tmp_path / "x.png") as image:
        assert image.height == 2 * 66 and len(np.unique(np.asarray(image))) > 20
    assert "not a published VAR transformer" in refused("sample.py", "--var", paths["vae"], *flags)


WRAPPED = {
    "the authors' training": lambda state, part: {
        "epoch": 3, "iter": 0, "trainer": {"vae_local": state["vae"], "var_wo_ddp": state["var"],
                                           "var_opt": {"optimizer": {"state": {0: torch.zeros(2)}}}}},
    "state_dict": lambda state, part: {"step": 7, "state_dict": state[part]},
    "model": lambda state, part: {"model": state[part], "args": None},
    "DDP": lambda state, part: {f"module.{name}": tensor for name, tensor in state[part].items()},
    "compile": lambda state, part: {f"_orig_mod.{name}": tensor for name, tensor in state[part].items()},
    "a compiled block": lambda state, part: {
        name.replace("blocks.1.", "blocks.1._orig_mod."): tensor for name, tensor in state[part].items()},
    "all at once": lambda state, part: {"model": {f"module._orig_mod.{name}": tensor
                                                  for name, tensor in state[part].items()}},
    "both models in one": lambda state, part: {f"{part}.{name}": tensor for part in state
                                               for name, tensor in state[part].items()},
}


def test_a_transformer_is_trained_on_a_published_tokenizer(case, folder, tmp_path):
    """It is read before any image, and takes the place of the preset's flags for tokenizers."""
    torch.save(case[0]["vae"], tmp_path / "vae.pth")
    config = Tokenizer.from_official(case[0]["vae"]).config
    flags = ["--data", folder, "--out", tmp_path / "run", "--tokenizer", tmp_path / "vae.pth",
             "--device", "cpu"]
    told = refused("train.py", *flags, "--image-size", 256)
    assert f"--image-size 256 is not that of the tokenizer, which has {config.image_side}" in told
    assert "--vocabulary 7 is not that" in refused("train.py", *flags, "--vocabulary", 7)
    assert not (tmp_path / "run").exists()   # nothing was decoded
    ran("train.py", *flags, "--var-steps", 1, "--var-batch", 2, "--width", 32, "--depth", 1)
    assert (tmp_path / "run" / "samples.png").exists()


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_wrapped_and_prefixed_files_are_opened(case, wrap):
    for part, read in (("vae", tokenizer_of), ("var", transformer_of)):
        values, state = read(wrap(case[0], part))
        expected_values, expected_state = read(case[0][part])
        assert values == expected_values and state.keys() == expected_state.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in expected_state.items())


@pytest.mark.parametrize("content, holds", [
    ({"weight": 0, "bias": 1, "a": 2, "b": 3, "c": 4}, "but holds weight, bias, a, b, ..."),
    ({"model": {"pos_1LCD": 0, "xpos_1LC": 0}}, "but holds model$"), ({}, "but holds {}"), ([1, 2], "but holds list")])
def test_other_files_are_refused_by_what_they_hold(content, holds):
    with pytest.raises(ValueError, match="not a published VAR transformer: it has no pos_1LC " + holds):
        VAR.from_official(content)
    with pytest.raises(ValueError, match="not a published VAR tokenizer: it has no quantize.embedding.weight " + holds):
        Tokenizer.from_official(content)


def test_the_sides_of_token_maps_are_those_published_or_given(case):
    state = dict(case[0]["vae"])
    K = len(state["quantize.ema_vocab_hit_SV"])
    assert tokenizer_of(state)[0]["scales"] == tuple(range(1, K + 1))
    given = (1, *range(3, K + 2))
    assert Tokenizer.from_official(state, given).config.scales == given
    state["quantize.ema_vocab_hit_SV"] = torch.zeros(10, 1)
    assert tokenizer_of(state)[0]["scales"] == PUBLISHED_SCALES


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
