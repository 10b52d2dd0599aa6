"""Everything sample.py does with a trained run, through its command line, and what its pictures
hold."""
from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from program import ran, refused
from var import VAR, PackedLinear

GAP = 2
CELL = 64


def draw(shapes: Path, path: Path, *arguments) -> tuple[np.ndarray, str]:
    """The picture a command writes, and what it says."""
    said = ran("sample.py", "--run", shapes, "--precision", "fp32", "--out", path, *arguments)
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")), said


def columns(picture: np.ndarray, count: int) -> list[np.ndarray]:
    """The last `count` columns of a grid, without the gaps."""
    begin = picture.shape[1] - count * (CELL + GAP)
    return [picture[:, begin + i * (CELL + GAP):][:, :CELL] for i in range(count)]


def opened(shapes: Path, *arguments) -> tuple[sample.Run, sample.Given]:
    """The run and 40 images of it, for numbers that a picture does not show."""
    images = [f"data:{i}" for i in range(40)]
    options = sample.parse(["--run", str(shapes), "--device", "cpu", "--precision", "fp32",
                            "--task", "inpaint", "--image", *images, *map(str, arguments)])
    sample.settle_device(options)
    run = sample.load(options)
    return run, sample.load_images(run, options.image)


# Completing images


@pytest.mark.parametrize("task", ["inpaint", "outpaint", "edit", "upscale"])
def test_completing_keeps_what_is_known(shapes, tmp_path, task):
    flags = [] if task == "upscale" else ["--paste", "--box", 0, 0, 0.5, 1]
    if task == "edit":
        flags += ["--classes", "star"]
    picture, said = draw(shapes, tmp_path / "a.png", "--task", task, "--image", "data:3", "data:5",
                         "--seeds", 0, 1, *flags)
    assert picture.shape[0] == 2 * (CELL + GAP)
    original, shown, first, second = columns(picture, 4)
    assert not np.array_equal(first, second)   # two seeds
    if task == "upscale":
        assert not np.array_equal(original, shown) and not np.array_equal(shown, first)
        return
    top = np.s_[:CELL // 2]
    bottom = np.s_[CELL // 2:CELL]
    known, made = (top, bottom) if task == "outpaint" else (bottom, top)
    for column in (shown, first, second):
        assert np.array_equal(column[known], original[known])
    assert not np.array_equal(first[made], original[made])
    assert float(said.split("error ")[1].split()[0]) < 1e-4


def test_upscaling_reads_the_small_image_alone(shapes, tmp_path):
    """Two images with the same small one have the same result."""
    image = sample.load_held_out(shapes).tensors[0][3]
    small = image.float().view(3, 8, 2, 8, 2).mean(dim=(2, 4), keepdim=True)
    flat = small.expand(3, 8, 2, 8, 2).reshape(3, 16, 16)
    rough = flat + torch.tensor([[8.0, -8.0], [-8.0, 8.0]]).repeat(8, 8)
    for name, pixels in (("flat", flat), ("rough", rough.clamp(0, 255))):
        array = pixels.round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(array).save(tmp_path / f"{name}.png")
    results = []
    for name in ("flat", "rough"):
        picture, _ = draw(shapes, tmp_path / "a.png", "--task", "upscale", "--small", 4,
                          "--image", tmp_path / f"{name}.png", "--seeds", 1)
        results.append(columns(picture, 1)[0])
    assert np.abs(results[0].astype(int) - results[1]).max() <= 8   # but for rounding to bytes


@pytest.mark.parametrize("side, scales", [(15, 2), (8, 2), (7, 1), (4, 1), (1, 1)])
def test_small_images_are_as_many_scales_as_they_have_pixels_for(shapes, side, scales):
    """Of 16 pixels a side the scales are 1x1, 2x2 and 4x4, and a code is for 4 x 4 pixels."""
    run, given = opened(shapes)
    run.options.small = side
    assert sample.from_small(run, given.images)[1] == scales


def test_everything_known_is_the_reconstruction(shapes, tmp_path):
    Image.new("L", (16, 16), "black").save(tmp_path / "nothing.png")
    kept, _ = draw(shapes, tmp_path / "a.png", "--task", "inpaint", "--image", "data:3",
                   "--mask", tmp_path / "nothing.png", "--seeds", 0)
    plain, said = draw(shapes, tmp_path / "b.png", "--task", "reconstruct", "--image", "data:3")
    assert np.array_equal(columns(kept, 1)[0], columns(plain, 1)[0][CELL + GAP:])
    error = (columns(plain, 1)[0][:CELL].astype(float) - columns(plain, 1)[0][CELL + GAP:-GAP]) / 255
    expected = 10 * np.log10(1 / np.square(error).mean())
    assert float(said.split("PSNR ")[1].split()[0]) == pytest.approx(expected, abs=0.1)


def test_nothing_known_is_plain_generation(shapes, tmp_path):
    Image.new("RGBA", (40, 30), "white").save(tmp_path / "all.png")
    made, _ = draw(shapes, tmp_path / "a.png", "--task", "edit", "--classes", "heart",
                   "--image", "data:3", "--mask", tmp_path / "all.png", "--seeds", 4)
    plain, _ = draw(shapes, tmp_path / "b.png", "--classes", "heart", "--per-class", 1, "--seed", 4)
    assert np.array_equal(columns(made, 1)[0], columns(plain, 1)[0])


def test_the_open_loop_puts_the_image_s_own_tokens(shapes, monkeypatch):
    """And the closed one others, as soon as a coarser scale was generated."""
    tokens = []
    for loop in ([], ["--open-loop"]):
        run, given = opened(shapes, "--box", 0, 0, 0.5, 1, "--seeds", 0, *loop)
        decode = run.decode
        monkeypatch.setattr(run, "decode", lambda x: tokens.append(x) or decode(x))
        sample.complete(run, given)
    known_HW = sample.known_pixels(run)
    own_NL = run.encode(sample.fill_holes(given.images, known_HW))[1]
    known_L = torch.tensor([1] + [0, 0, 1, 1] + [0] * 8 + [1] * 8).bool()
    closed_NL, open_NL = tokens
    assert torch.equal(open_NL[:, known_L], own_NL[:, known_L])
    assert not torch.equal(closed_NL[:, known_L], own_NL[:, known_L])
    assert torch.equal(closed_NL[:, 0], own_NL[:, 0])   # nothing was generated before it


def test_the_encoder_does_not_see_the_hole(shapes):
    run, given = opened(shapes)
    known_HW = sample.known_pixels(run)
    filled = sample.fill_holes(given.images, known_HW)
    other = torch.where(known_HW > 0, given.images, torch.rand_like(given.images))
    assert torch.equal(filled, sample.fill_holes(other, known_HW))
    assert torch.equal(filled * known_HW, given.images * known_HW)
    flat = torch.full_like(given.images, 0.3)
    torch.testing.assert_close(sample.fill_holes(flat * known_HW, known_HW), flat)


def test_the_report_on_a_completion(capsys):
    images = torch.zeros(2, 3, 4, 4)
    known_HW = torch.ones(4, 4)
    known_HW[:, 2:] = 0
    images[:, :, :, 2:] = 0.5   # a step of 0.5 at the border, 0.25 in [0, 1]
    result = images.clone()
    result[:, :, 0, 0] = 0.4    # one pixel of the 8 that are known
    result[:, :, :, 2:] = 1.0
    sample.report([result, images], images, known_HW)
    said = capsys.readouterr().out
    assert f"error {0.2**2 / 8 / 2:.5f}" in said
    assert "mean step 0.3750, 1.50 of the image's own" in said


# Pictures


def test_images_of_any_kind(shapes, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    for mode, ending in (("L", "png"), ("RGBA", "webp"), ("P", "png"), ("RGB", "jpg"),
                         ("CMYK", "jpg"), ("1", "png"), ("I;16", "png")):
        Image.new(mode, (30, 50)).save(folder / f"{mode.replace(';', '')}.{ending}")
    picture, said = draw(shapes, tmp_path / "a.png", "--task", "reconstruct", "--image", folder,
                         "data:0")
    assert said.count("PSNR") == 8 and picture.shape[0] == 2 * (CELL + GAP)


def test_pictures_that_explain(shapes, tmp_path):
    codes, _ = draw(shapes, tmp_path / "codes.png", "--codes", "data:3", "data:4")
    assert codes.shape[0] == 6 * (CELL + GAP)   # left over, codes, image so far
    coarse = columns(codes, 3)[0][CELL + GAP:2 * CELL + GAP]
    assert len(np.unique(coarse.reshape(-1, 3), axis=0)) == 1   # a single code
    teaching, _ = draw(shapes, tmp_path / "teaching.png", "--teaching", "data:3")
    second = np.s_[CELL + GAP:2 * CELL + GAP]   # the second row
    for read, code, s in zip(columns(teaching, 3), columns(codes, 3), (1, 2, 4)):
        assert len(np.unique(read[:CELL].reshape(-1, 3), axis=0)) <= s * s
        assert np.array_equal(read[second], code[second])   # what is to be predicted: its codes
    attention, said = draw(shapes, tmp_path / "attention.png", "--attention", "data:3",
                           "--cell", 0, 3)
    assert len(np.unique(attention.reshape(-1, 3), axis=0)) > 20
    red = (columns(attention, 4)[0][:CELL] == (255, 0, 0)).all(axis=-1)   # around the cell
    rows, places = red.nonzero()
    assert (rows.min(), rows.max()) == (0, CELL // 4 - 1)
    assert (places.min(), places.max()) == (CELL * 3 // 4, CELL - 1)
    shares = [line.split()[2:] for line in said.splitlines() if line.startswith("layer")]
    assert len(shares) == len(attention) // (CELL + GAP)
    for row in shares:
        assert len(row) == 3 and sum(float(share.strip("%")) for share in row) == pytest.approx(
            100, abs=2)
    draw(shapes, tmp_path / "a.png", "--gif", tmp_path / "a.gif", "--per-class", 2)
    with Image.open(tmp_path / "a.gif") as film:
        assert film.n_frames == 3 and film.info["loop"] == 0
        times = []
        for frame in range(3):
            film.seek(frame)
            times.append(film.info["duration"])
        assert times == [400, 400, 2000]   # the finished images stay for a while


def test_the_attention_drawn_is_that_of_the_cell(shapes, tmp_path, monkeypatch):
    asked = []
    attention_weights = VAR.attention_weights

    def noted(model, labels_B, inputs, query):
        asked.append((labels_B.tolist(), query))
        return attention_weights(model, labels_B, inputs, query)

    monkeypatch.setattr(VAR, "attention_weights", noted)
    label = sample.load_held_out(shapes).tensors[1][3].item()
    for classes in ([], ["--classes", "star"]):
        draw(shapes, tmp_path / "a.png", "--attention", "data:3", "--cell", 0, 3, *classes)
    assert asked == [([label], 1 + 4 + 3), ([4], 1 + 4 + 3)]


@pytest.mark.parametrize("normalise_qk", [True, False])
def test_attention_weights_are_what_the_layer_computes(shapes, normalise_qk):
    run, given = opened(shapes)
    torch.manual_seed(0)
    model = VAR(replace(run.model.config, normalise_qk=normalise_qk)).eval()
    inputs = run.tokenizer.teacher_inputs(run.encode(given.images[:1])[1])
    seen = {}
    block = model.blocks[0].attention
    hook = block.register_forward_hook(
        lambda module, arguments, result: seen.update(x=arguments[0], o=result))
    with torch.no_grad():
        weights_L = model.attention_weights(torch.tensor([2]), inputs, query=4)[0]
        hook.remove()
        assert abs(weights_L.sum() - 1) < 1e-5
        assert weights_L[5:].abs().max() == 0   # scales 1x1 and 2x2 alone
        # Averaging over heads is no loss if the values of all heads are the same.
        v_BHLD = block.project(seen["x"])[2]
        q_BHLD, k_BHLD, _, scale = block.project(seen["x"])
        scores_HL = scale * torch.einsum("hd,hld->hl", q_BHLD[0, :, 4], k_BHLD[0, :, :5])
        each_HL = scores_HL.softmax(dim=1)
        torch.testing.assert_close(weights_L[:5], each_HL.mean(dim=0))
        o_W = torch.einsum("hl,hld->hd", each_HL, v_BHLD[0, :, :5]).flatten()
        torch.testing.assert_close(block.out(o_W), seen["o"][0, 4])


# For evaluation


def test_samples_for_evaluation(shapes, tmp_path):
    for flags in ([], ["--rejection", 0.5]):
        ran("sample.py", "--run", shapes, "--npz", 23, tmp_path / "a.npz", *flags)
        images = np.load(tmp_path / "a.npz")["arr_0"]
        assert images.shape == (23, 16, 16, 3) and images.dtype == np.uint8 and images.std() > 10
    ran("sample.py", "--run", shapes, "--reference", tmp_path / "b.npz")
    reference = np.load(tmp_path / "b.npz")["arr_0"]
    held_out = sample.load_held_out(shapes).tensors[0]
    assert np.array_equal(reference, held_out.permute(0, 2, 3, 1))


def test_likelihoods(shapes):
    """Against the sum over tokens, one at a time."""
    run, given = opened(shapes)
    tokens_NL = run.encode(given.images[:3])[1]
    labels = [0, 4, 7]
    found_N = run.log_likelihood(tokens_NL, labels)
    with torch.no_grad():
        logits_NLV = run.model(torch.tensor(labels), run.tokenizer.teacher_inputs(tokens_NL))
    for n in range(3):
        shares_LV = logits_NLV[n].softmax(dim=-1)
        expected = sum(shares_LV[i, token].log() for i, token in enumerate(tokens_NL[n]))
        torch.testing.assert_close(found_N[n], expected)


def test_rejection_keeps_the_most_likely(shapes, monkeypatch):
    run, _ = opened(shapes)
    labels = [label for label in range(10) for _ in range(4)]
    tokens_NL = run.generate(labels, 0)
    likelihoods = run.log_likelihood(tokens_NL, labels).view(10, 4)
    run.options.rejection = 0.5
    shown = []

    def decode_to_bytes(tokens_NL):
        shown.append(tokens_NL)
        return np.zeros((len(tokens_NL), 16, 16, 3), np.uint8)

    monkeypatch.setattr(run, "decode_to_bytes", decode_to_bytes)
    sample.draw_many(run, 20)
    kept = run.log_likelihood(shown[0], [label for label in range(10) for _ in range(2)])
    best = likelihoods.topk(2, dim=1).values
    torch.testing.assert_close(kept.view(10, 2).sort(dim=1).values, best.sort(dim=1).values)


# How images come out


def test_what_crosses_from_the_device_is_bytes(shapes, monkeypatch):
    run, given = opened(shapes)
    tokens_NL = run.encode(given.images)[1]
    images = run.decode(tokens_NL)
    expected = sample.to_bytes(images)
    monkeypatch.setattr(sample, "at_a_time", lambda side: 16)
    crossed = []
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: crossed.append(x) or cpu(x))
    assert np.array_equal(run.decode_to_bytes(tokens_NL), expected)
    assert [(x.dtype, len(x)) for x in crossed] == 2 * [(torch.uint8, 16)] + [(torch.uint8, 8)]


def test_every_pass_of_a_compiled_decoder_has_the_same_shape(shapes, monkeypatch):
    run, given = opened(shapes)
    tokens_NL = run.encode(given.images)[1]
    whole = run.decode(tokens_NL)
    monkeypatch.setattr(sample, "at_a_time", lambda side: 16)
    passes = []
    run.tokenizer.decoder.register_forward_pre_hook(lambda _, given: passes.append(len(given[0])))
    for compiled in (False, True):
        run.options.compile = compiled
        for images, few in ((run.decode(tokens_NL), 40), (run.decode(tokens_NL[:3]), 3)):
            torch.testing.assert_close(images, whole[:few])
    assert passes == [16, 16, 8, 3] + [16, 16, 16, 3]


def test_a_settled_decoder_computes_in_its_dtype_alone(shapes):
    run, given = opened(shapes)
    tokens_NL = run.encode(given.images)[1]
    whole = run.decode(tokens_NL)
    run.tokenizer.settle_decoder(torch.bfloat16)
    seen = set()
    for part in run.tokenizer.decoder.modules():
        part.register_forward_hook(lambda *parts: seen.add(parts[-1].dtype))
    run.options.autocast = lambda: torch.autocast("cpu", torch.float16)   # asks for another
    images = run.decode(tokens_NL)
    assert seen == {torch.bfloat16} and images.dtype == torch.float32
    assert 0 < (images - whole).abs().mean() < 0.02
    weight = run.tokenizer.decoder.conv_out.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert run.encode(given.images)[0].dtype == torch.float32   # the encoder is as before


def test_compiled_parts_draw_the_same_images(shapes, tmp_path, monkeypatch):
    """Two graphs for each scale, the first layer's and that of all others, and the decoder's; in
    two batches, of which the second compiles nothing."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **flags: compile_module(
        module, backend=count, fullgraph=True, **flags))
    monkeypatch.setattr(sample, "check_compiler", lambda device: None)
    torch._dynamo.reset()
    plain, _ = draw(shapes, tmp_path / "a.png", "--batch", 40)
    compiled, _ = draw(shapes, tmp_path / "b.png", "--batch", 40, "--compile")
    depth = len(opened(shapes)[0].model.blocks)
    assert len(graphs) == 3 * min(depth, 2) + 1
    assert np.array_equal(plain, compiled)


# Mistakes


def test_a_run_is_whole_without_its_data(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    for path in run.glob("*.images"):
        path.unlink()
    (run / "tokens.pt").unlink()
    ran("sample.py", "--run", run, "--codes", "data:1")
    (run / "held_out.pt").write_bytes(b"nothing")
    assert "held_out.pt cannot be read" in refused("sample.py", "--run", run, "--codes", "data:1")


def test_mistakes(shapes, tmp_path):
    def refusal(*arguments) -> str:
        return refused("sample.py", "--run", shapes, *arguments)

    ask = ("--image", "data:3", "--task")
    assert "needs --image" in refusal("--task", "inpaint")
    assert "needs --classes" in refusal(*ask, "edit")
    assert "--box: 1.5 must be from 0 to 1" in refusal(*ask, "inpaint", "--box", 0, 0, 1.5, 1)
    assert "nan must be from 0 to 1" in refusal(*ask, "inpaint", "--box", 0, 0, "nan", 1)
    assert "hold at least a pixel" in refusal(*ask, "inpaint", "--box", 0.5, 0, 0.5, 1)
    assert "less than the side" in refusal(*ask, "upscale", "--small", 16)
    assert "--small: 0 must be" in refusal(*ask, "upscale", "--small", 0)
    assert "data:0 to data:999" in refusal("--codes", "data:1000")
    assert "cannot be read" in refusal("--codes", tmp_path / "missing.png")
    assert "cannot be read" in refusal(*ask, "inpaint", "--mask", tmp_path / "missing.png")
    assert "holds no images" in refusal("--codes", tmp_path)
    assert "not allowed with argument --codes" in refusal("--codes", "data:1", "--attention", "data:1")
    assert "one class here" in refusal(*ask, "edit", "--classes", "star", "heart")
    assert "is there and is no file" in refusal("--out", tmp_path)
    assert "is there and is no file" in refusal("--out", "/dev/null")
    assert "must be a whole number, from 0" in refusal("--seed", 10**20)
    assert "within the last map" in refusal("--attention", "data:3", "--cell", 4, 0)
    for count in ("many", 0, 10**12):
        assert "a number of images" in refusal("--npz", count, tmp_path / "a.npz")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch is without oneDNN")
def test_packed_products_are_the_same(finished):
    options = sample.parse(["--run", str(finished), "--device", "cpu", "--precision", "fp32"])
    sample.settle_device(options)
    run = sample.load(options)
    before = copy.deepcopy(run.model)
    tokens_NL = run.generate([0, 1, 0], 0)
    likelihoods = run.log_likelihood(tokens_NL, [0, 1, 0])
    run.model.pack()
    packed = [module for module in run.model.modules() if isinstance(module, PackedLinear)]
    plain = [module for module in before.modules() if isinstance(module, torch.nn.Linear)]
    assert len(packed) == len(plain) > 5
    assert any(module.bias is None for module in packed)   # queries, keys and values
    assert torch.equal(run.generate([0, 1, 0], 0), tokens_NL)
    assert torch.allclose(run.log_likelihood(tokens_NL, [0, 1, 0]), likelihoods, atol=1e-3)


def test_a_picture_lies_beside_the_transformer_it_is_of(finished, tmp_path):
    for name in ("tokenizer.pt", "var.pt", "held_out.pt"):
        shutil.copy(finished / name, tmp_path / name)
    ran("sample.py", "--run", finished, "--tokenizer", tmp_path / "tokenizer.pt", "--var",
        tmp_path / "var.pt", "--codes", "data:1")
    assert (tmp_path / "codes.png").exists()


@pytest.mark.parametrize("flags, told", [
    ("--image data:3", "--image does nothing for sample: it is for inpaint"),
    ("--task upscale --image data:3 --paste", "--paste does nothing for upscale"),
    ("--task reconstruct --image data:3 --mask mask.png", "--mask does nothing for reconstruct"),
    ("--rejection 0.5", "--rejection does nothing for sample: it is for npz"),
    ("--npz 3 a.npz --classes star", "--classes does nothing for npz"),
    ("--npz 3 a.npz --out a.png", "--out does nothing for npz"),
    ("--evaluate 8 --reference r.npz", "--reference does nothing for evaluate"),
    ("--evaluate 8 --gif a.gif", "--gif does nothing for evaluate"),
    ("--codes data:0 --progress", "--progress: not allowed with argument --codes"),
    ("--task inpaint --progress", "--progress: not allowed with argument --task"),
    ("--task reconstruct --image data:3 --reference r.npz", "--reference does nothing for reconst"),
    ("--task inpaint --image data:3 --mask m.png --box 0 0 1 .5", "not allowed with argument --mask"),
    ("--codes data:0 --cfg 3", "--cfg does nothing for codes"),
    ("--reference r.npz --top-p 0.5", "--top-p does nothing for reference"),
    ("--out same --gif same", "one file cannot hold both"),
    ("--npz 3 x/../a.npz --reference a.npz", "one file cannot hold both"),
    ("--codes data:0 --seed 3", "--seed does nothing for codes"),
    ("--progress --cell 0 0", "--cell does nothing for progress"),
    ("--small 3", "--small does nothing for sample: it is for upscale"),
])
def test_a_flag_that_would_do_nothing_is_refused(shapes, flags, told):
    assert told in refused("sample.py", "--run", shapes, *flags.split())
