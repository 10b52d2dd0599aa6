"""The published implementation's numbers, reproduced from deterministic weights (tests/golden/weights.py)."""
import contextlib
import hashlib
import json
import re
import shutil
import sys
import threading
import types
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import weights
from PIL import Image
from program import ran, refused

from support import published
from support.asked import asked_classes, class_indices
from support.presets import PRESETS
from support.published import PUBLISHED_SCALES, class_names, tokenizer_of, transformer_of
from tokenizer import Tokenizer, TokenizerConfig
from var import VAR, VARConfig

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
    assert not tokenizer.training
    norms = [part for part in tokenizer.modules() if isinstance(part, torch.nn.GroupNorm)]
    assert {norm.eps for norm in norms} == {1e-6}
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
    close(model(expected["labels"], expected["teacher_input"]), expected["logits"], 5e-5)
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
        assert image.height == 2 * 132 and len(np.unique(np.asarray(image))) > 20
    other = shutil.copy(paths["var"], tmp_path / "var.bin")   # whatever its ending
    ran("sample.py", "--var", other, *flags)
    assert "not a published VAR transformer" in refused("sample.py", "--var", paths["vae"], *flags)
    inside = {}
    inside["itself"] = inside
    for content, told in ((inside, "holds itself"), ({"kind": "tokenizer"}, "names end in .pt")):
        torch.save(content, tmp_path / "odd.pth")
        assert told in refused("sample.py", "--var", tmp_path / "odd.pth", *flags)
    read, codes = "word_embed.weight", "quantize.embedding.weight"
    weight = case[0]["var"][read]
    for part, name, value, told in (
            ("var", read, torch.cat([weight, weight], dim=1), "expects code channels"),
            ("var", read, weight / 0, "is not finite"),
            ("vae", codes, case[0]["vae"][codes] / 0, "is not finite")):
        torch.save({**case[0][part], name: value}, paths[part])
        assert told in refused("sample.py", "--var", paths["var"], *flags)
        torch.save(case[0][part], paths[part])


def test_published_files_are_explored(case, tmp_path):
    """There are no held-out images."""
    for part in ("vae", "var"):
        torch.save(case[0][part], tmp_path / f"{part}.pth")
    ran("sample.py", "explore", "--tokenizer", tmp_path / "vae.pth", "--var", tmp_path / "var.pth", "--classes", "2",
        "--out", tmp_path / "x.html")
    page = json.loads(re.search('id="data">(.*?)</script>', (tmp_path / "x.html").read_text(), re.S)[1])
    (image,) = page["images"]
    config = VAR.from_official(case[0]["var"]).config
    assert image["name"] == "2" and page["wanted"] == 1 and page["scales"] == list(config.scales)
    assert len(image["tokens"]) == config.length and page["vocabulary"] == config.vocabulary


@contextlib.contextmanager
def served(files: dict[str, bytes], missing: int = 0):
    """A server of these files on the loopback address; it breaks off so many bytes before the end.

    Yields its address and the names that are asked for."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path[1:])
            content = files[self.path[1:]]
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:len(content) - missing])

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/", asked
        finally:
            server.shutdown()


@pytest.fixture
def zoo(case, tmp_path, monkeypatch):
    """The small published models as the contents of files, taken for d16 and its tokenizer."""
    files = {}
    for part, name in (("vae", "vae_ch160v4096z32.pth"), ("var", "var_d16.pth")):
        torch.save(case[0][part], tmp_path / "saved")
        files[name] = (tmp_path / "saved").read_bytes()
        monkeypatch.setitem(published.FILES, name, hashlib.sha256(files[name]).hexdigest())
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    return files


FLAGS = ["--published", "d16", "--classes", "2", "7", "--per-class", "1"]


def test_published_models_are_downloaded_once(zoo, monkeypatch):
    with served(zoo) as (url, asked):
        monkeypatch.setattr(published, "URL", url)
        ran("sample.py", *FLAGS)
        assert asked == list(zoo)
    assert {path.name for path in Path("data/published").iterdir()} == {*zoo, "grid.png"}
    ran("sample.py", *FLAGS, "--out", "again.png")   # nobody serves any more
    assert Path("again.png").read_bytes() == Path("data/published/grid.png").read_bytes()


@pytest.mark.parametrize("damage", ["another", "broken off", "nobody there"])
def test_published_models_are_whole_or_not_there(zoo, damage, monkeypatch):
    content = {**zoo, "var_d16.pth": zoo["var_d16.pth"] + b"more"} if damage == "another" else zoo
    with served(content, missing=1 if damage == "broken off" else 0) as (url, _):
        monkeypatch.setattr(published, "URL", url)
        if damage != "nobody there":
            told = refused("sample.py", *FLAGS)
    if damage == "nobody there":
        told = refused("sample.py", *FLAGS)
    name = "var_d16.pth" if damage == "another" else "vae_ch160v4096z32.pth"
    assert f"cannot download {url}{name} (" in told
    assert told.endswith(f"fetch it by other means, as {Path('data/published') / name}")
    assert name not in {path.name for path in Path("data/published").iterdir()}
    assert not list(Path("data/published").glob("*.partial"))


def test_a_published_file_that_was_put_there_half_is_told(zoo):
    Path("data/published").mkdir(parents=True)
    for name, content in zoo.items():
        Path("data/published", name).write_bytes(content[:len(content) // 2])
    assert "var_d16.pth cannot be read, it is damaged" in refused("sample.py", *FLAGS)


@pytest.mark.parametrize("depth, side, million, size", [
    (16, 16, 310, 1_243_116_346), (20, 16, 600, 2_405_720_018), (24, 16, 1000, 4_135_702_618),
    (30, 16, 2000, 8_042_296_286), (36, 32, 2300, 9_436_153_085)])
def test_the_published_transformers_are_told_by_their_shapes(depth, side, million, size):
    """Names and shapes as the authors' VAR has them, without values: as many parameters as their
    README says, and as many bytes as the file has; those of d24 and d30 are of their first version."""
    scales = PUBLISHED_SCALES if side == 16 else (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
    W, L, shared = 64 * depth, sum(s * s for s in scales), depth == 36
    block = {"attn.scale_mul_1H11": [1, depth, 1, 1], "attn.q_bias": [W], "attn.v_bias": [W], "attn.zero_k_bias": [W],
             "attn.mat_qkv.weight": [3 * W, W], "attn.proj.weight": [W, W], "attn.proj.bias": [W],
             "ffn.fc1.weight": [4 * W, W], "ffn.fc1.bias": [4 * W], "ffn.fc2.weight": [W, 4 * W], "ffn.fc2.bias": [W]}
    block |= {"ada_gss": [1, 1, 6, W]} if shared else {"ada_lin.1.weight": [6 * W, W], "ada_lin.1.bias": [6 * W]}
    shapes = {"pos_start": [1, 1, W], "pos_1LC": [1, L, W], "attn_bias_for_masking": [1, 1, L, L],
              "word_embed.weight": [W, 32], "word_embed.bias": [W], "class_emb.weight": [1001, W],
              "lvl_embed.weight": [10, W], "head_nm.ada_lin.1.weight": [2 * W, W], "head_nm.ada_lin.1.bias": [2 * W],
              "head.weight": [4096, W], "head.bias": [4096]}
    shapes |= {"shared_ada_lin.1.weight": [6 * W, W], "shared_ada_lin.1.bias": [6 * W]} if shared else {}
    shapes |= {f"blocks.{i}.{name}": shape for i in range(depth) for name, shape in block.items()}
    content = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    content["lvl_1L"] = torch.tensor([[k for k, s in enumerate(scales) for _ in range(s * s)]])
    values, state = transformer_of(content)
    config = VARConfig(**values)
    assert config.scales == scales and config.shared_adaln == shared
    assert (config.depth, config.heads, config.width, config.classes) == (depth, depth, W, 1000)
    rates = {16: 1 / 15, 20: 1 / 12, 24: 0.1, 30: 0.125, 36: 0.15}   # it grows with the depth
    assert (config.drop_path, config.label_dropout) == (pytest.approx(rates[depth]), 0.1)
    if depth == 16:
        preset = PRESETS["imagenet256"]
        assert VARConfig(**preset.var_shape(1000)) == config
        assert TokenizerConfig(**preset.tokenizer_shape(3)) == TokenizerConfig(
            scales, vocabulary=4096, code_channels=32, image_channels=3, width=160,
            multipliers=(1, 1, 2, 2, 4), blocks=2, phis=4, norm_groups=32)
    assert sum(x.numel() for x in state.values()) == pytest.approx(million * 1e6, rel=0.05)
    assert 4 * sum(x.numel() for x in content.values()) == pytest.approx(size, rel=1e-3)
    assert len(published.FILES[f"var_d{depth}.pth"]) == 64


def test_classes_of_imagenet_have_names_where_torchvision_is(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models", None)   # as if it were not installed
    assert class_names(1000) == [str(i) for i in range(1000)]
    known = [f"kind {i}" for i in range(1000)]
    weights = types.SimpleNamespace(DEFAULT=types.SimpleNamespace(meta={"categories": known}))
    for name, module in (("torchvision", types.ModuleType("torchvision")),
                         ("torchvision.models", types.SimpleNamespace(ResNet18_Weights=weights))):
        monkeypatch.setitem(sys.modules, name, module)
    names = class_names(1000)
    assert class_indices(["kind 207", "980"], names) == [207, 980]
    run = types.SimpleNamespace(classes=names)
    assert asked_classes(run, None, 1) == (known[:20], [*range(20)])
    assert asked_classes(run, ["207", "kind 3"], 2) == (["207 kind 207", "kind 3"], [207, 207, 3, 3])
    assert class_names(10) == list("0123456789")
    assert class_indices(["1", "2"], ["zero", "2", "1"]) == [2, 1]   # names come before numbers


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
    last = config.scales[-1] + 1   # its tensors do not tell its scales
    told = refused("train.py", *flags, "--image-size", 256, "--scales",
                   ",".join(map(str, (*config.scales[:-1], last))))
    assert f"which has {last * config.downsampling}" in told
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
    ({"weight": 0, "bias": 1, "a": 2, "b": 3, "c": 4}, "but holds weight, bias, a, b, c$"),
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


def test_phis_are_counted(case):
    """One for all scales, and as many as there are for neighbouring ones."""
    state = {name.replace("qresi_ls.0.", "qresi."): tensor for name, tensor in case[0]["vae"].items()
             if not re.search(r"qresi_ls\.[1-9]", name)}
    assert Tokenizer.from_official(state).config.phis == 1


def test_classes_have_numbers_where_torchvision_is_of_another_pytorch(monkeypatch):
    class Broken(types.ModuleType):
        def __getattr__(self, name):
            raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", Broken("torchvision.models"))
    assert class_names(1000) == [str(i) for i in range(1000)]


def test_models_of_two_vocabularies_do_not_belong_together(case, tmp_path):
    torch.save(case[0]["vae"], tmp_path / "vae.pth")
    fewer = {name: case[0]["var"][name][:-1] for name in ("head.weight", "head.bias")}
    torch.save({**case[0]["var"], **fewer}, tmp_path / "var.pth")
    assert "expects vocabulary" in refused(
        "sample.py", "--var", tmp_path / "var.pth", "--tokenizer", tmp_path / "vae.pth")
