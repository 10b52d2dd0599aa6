"""Everything sample.py does with a trained run, through its command line, and what its pictures hold."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train
from program import TINY, refused, run

GAP, CELL = 2, 64


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A short run on the built-in data: its reconstructions already resemble the images."""
    out = tmp_path_factory.mktemp("shapes")
    small = dict(zip(TINY[::2], TINY[1::2]), **{"--image-size": "16", "--scales": "1,2,4", "--multipliers": "1,2,2",
                                                "--tokenizer-steps": "150", "--var-steps": "60", "--code-channels": "8"})
    result = run("train.py", "--out", out, *(part for pair in small.items() for part in pair))
    assert result.returncode == 0, result.stderr
    return out


def draw(shapes, path, *arguments) -> tuple[np.ndarray, str]:
    """The picture a command writes, and what it says."""
    result = run("sample.py", "--run", shapes, "--out", path, *arguments)
    assert result.returncode == 0, result.stderr
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")), result.stdout


def columns(picture: np.ndarray, count: int) -> list[np.ndarray]:
    """The last `count` columns of a grid, without the gaps."""
    begin = picture.shape[1] - count * (CELL + GAP)
    return [picture[:, begin + i * (CELL + GAP):][:, :CELL] for i in range(count)]


def opened(shapes, *arguments) -> tuple[sample.Run, sample.Given]:
    """The same in this process, for numbers that a picture does not show."""
    options = sample.parse(["--run", str(shapes), "--image", *(f"data:{i}" for i in range(40)), *arguments])
    options.device, options.precision = "cpu", "fp32"
    train.settle_device(options)
    opened_run = sample.load(options)
    return opened_run, sample.load_images(opened_run, options.image)


def completed(shapes, monkeypatch, *arguments) -> list[torch.Tensor]:
    """The results of a task, one per seed, before they are put into a grid."""
    opened_run, given = opened(shapes, "--seeds", "0", *arguments)
    results, decode = [], opened_run.decode
    monkeypatch.setattr(sample.Run, "decode", lambda self, tokens_NL: results.append(decode(tokens_NL)) or results[-1])
    sample.complete(opened_run, given)
    return results


@pytest.mark.parametrize("task", ["inpaint", "outpaint", "edit", "upscale"])
def test_completing_keeps_what_is_kept(shapes, tmp_path, task):
    extra = {"edit": ["--paste", "--classes", "star"], "upscale": []}.get(task, ["--paste"])
    picture, said = draw(shapes, tmp_path / "a.png", "--task", task, "--image", "data:3", "data:5", "--seeds", 0, 1,
                         "--box", 0, 0, 0.5, 1, *extra)
    assert picture.shape[0] == 2 * (CELL + GAP)
    original, shown, first, second = columns(picture, 4)
    assert not np.array_equal(first, second)   # two seeds
    if task == "upscale":
        assert not np.array_equal(original, shown) and not np.array_equal(shown, first)
        return
    top, bottom = (np.s_[y:y + CELL // 2] for y in (0, CELL // 2))
    kept, made = (top, bottom) if task == "outpaint" else (bottom, top)
    for column in (shown, first, second):
        assert np.array_equal(column[kept], original[kept])
    assert not np.array_equal(first[made], original[made])
    assert "mean squared error 0.00000" in said or float(said.split("error ")[1].split()[0]) < 1e-4


def test_everything_kept_is_the_reconstruction(shapes, tmp_path):
    Image.new("L", (16, 16), "black").save(tmp_path / "nothing.png")
    kept, _ = draw(shapes, tmp_path / "a.png", "--task", "inpaint", "--image", "data:3", "--mask", tmp_path / "nothing.png", "--seeds", 0)
    plain, said = draw(shapes, tmp_path / "b.png", "--task", "reconstruct", "--image", "data:3")
    assert np.array_equal(columns(kept, 1)[0], columns(plain, 1)[0]) and "PSNR" in said


def test_nothing_kept_is_plain_generation(shapes, tmp_path):
    Image.new("RGBA", (40, 30), "white").save(tmp_path / "all.png")
    made, _ = draw(shapes, tmp_path / "a.png", "--task", "edit", "--classes", "heart", "--image", "data:3",
                   "--mask", tmp_path / "all.png", "--seeds", 4)
    plain, _ = draw(shapes, tmp_path / "b.png", "--classes", "heart", "--per-class", 1, "--seed", 4)
    assert np.array_equal(columns(made, 1)[0], columns(plain, 1)[0])


@pytest.mark.parametrize("box", [(0.25, 0.25, 0.75, 0.75), (0, 0, 1, 0.4), (0.5, 0, 1, 1)])
def test_the_closed_loop_keeps_better_than_the_open_one(shapes, monkeypatch, box):
    arguments = ["--task", "inpaint", "--box", *map(str, box)]
    opened_run, given = opened(shapes, *arguments)
    keep_HW = sample.kept_pixels(opened_run)
    closed, open_ = (((completed(shapes, monkeypatch, *arguments, *loop)[0] - given.images) * keep_HW).square().mean()
                     for loop in ([], ["--open-loop"]))
    assert closed <= open_


def test_the_encoder_does_not_see_the_hole(shapes):
    opened_run, given = opened(shapes, "--task", "inpaint")
    keep_HW = sample.kept_pixels(opened_run)
    other = torch.where(keep_HW > 0, given.images, torch.rand_like(given.images))
    assert torch.equal(sample.fill_holes(given.images, keep_HW), sample.fill_holes(other, keep_HW))
    assert torch.equal(sample.fill_holes(given.images, keep_HW) * keep_HW, given.images * keep_HW)
    flat = torch.full_like(given.images, 0.3)
    torch.testing.assert_close(sample.fill_holes(flat * keep_HW, keep_HW), flat)


def test_images_of_any_kind(shapes, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    for mode, ending in (("L", "png"), ("RGBA", "webp"), ("P", "png"), ("RGB", "jpg"), ("CMYK", "jpg"), ("1", "png"), ("I;16", "png")):
        Image.new(mode, (30, 50)).save(folder / f"{mode.replace(';', '')}.{ending}")
    picture, _ = draw(shapes, tmp_path / "a.png", "--task", "reconstruct", "--image", folder, "data:0")
    assert picture.shape[0] == 8 * (CELL + GAP)


def test_pictures_that_explain(shapes, tmp_path):
    codes, _ = draw(shapes, tmp_path / "codes.png", "--codes", "data:3", "data:4")
    assert codes.shape[0] == 4 * (CELL + GAP) and len(np.unique(columns(codes, 3)[0][:CELL].reshape(-1, 3), axis=0)) == 1
    attention, _ = draw(shapes, tmp_path / "attention.png", "--attention", "data:3", "--cell", 0, 3)
    assert len(np.unique(attention.reshape(-1, 3), axis=0)) > 20
    draw(shapes, tmp_path / "a.png", "--gif", tmp_path / "a.gif", "--per-class", 2)
    with Image.open(tmp_path / "a.gif") as film:
        assert film.n_frames == 3 and film.info["loop"] == 0


def test_attention_weights_are_what_the_layer_computes(shapes):
    opened_run, given = opened(shapes)
    model, inputs = opened_run.model, opened_run.tokenizer.teacher_inputs(sample.encode(opened_run, given.images[:1])[1])
    labels_B, query, seen = torch.tensor([2]), 4, {}
    block = model.blocks[0].attention
    hook = block.register_forward_hook(lambda module, arguments, result: seen.update(x=arguments[0], o=result))
    with torch.no_grad():
        weights_L = sample.attention_of(model, labels_B, inputs, query)[0]
        hook.remove()
        assert abs(weights_L.sum() - 1) < 1e-5 and weights_L[5:].abs().max() == 0   # scales 1x1 and 2x2 alone
        v_BHLD = block.project(seen["x"])[2]
        if v_BHLD.shape[1] == 1:
            torch.testing.assert_close(block.out((weights_L @ v_BHLD[0, 0])), seen["o"][0, query])


def test_samples_for_evaluation(shapes, tmp_path):
    for extra in ([], ["--rejection", 0.5]):
        result = run("sample.py", "--run", shapes, "--npz", 23, tmp_path / "a.npz", *extra)
        assert result.returncode == 0, result.stderr
        images = np.load(tmp_path / "a.npz")["arr_0"]
        assert images.shape == (23, 16, 16, 3) and images.dtype == np.uint8 and images.std() > 10
    assert run("sample.py", "--run", shapes, "--reference", tmp_path / "b.npz").returncode == 0
    assert np.load(tmp_path / "b.npz")["arr_0"].shape == (1000, 16, 16, 3)


def test_rejection_keeps_the_most_likely(shapes):
    opened_run, _ = opened(shapes)
    labels = [c for c in range(10) for _ in range(4)]
    tokens_NL = opened_run.generate(labels, 0)
    kept = opened_run.log_likelihood(tokens_NL, labels).view(10, 4).topk(2, dim=1).values
    opened_run.options.rejection, shown = 0.5, []
    opened_run.decode = lambda tokens_NL: shown.append(tokens_NL) or torch.zeros(len(tokens_NL), 3, 16, 16)
    sample.draw_many(opened_run, 20)
    again = opened_run.log_likelihood(shown[0], [c for c in range(10) for _ in range(2)]).view(10, 2)
    torch.testing.assert_close(again.sort(dim=1).values, kept.sort(dim=1).values)


def test_mistakes(shapes, tmp_path):
    def refusal(*arguments) -> str:
        return refused("sample.py", "--run", shapes, *arguments)

    ask = ("--image", "data:3", "--task")
    assert "needs --image" in refusal("--task", "inpaint")
    assert "needs --task" in refusal("--image", "data:3")
    assert "needs --classes" in refusal(*ask, "edit")
    assert "fractions, from 0 to 1" in refusal(*ask, "inpaint", "--box", 0, 0, 1.5, 1)
    assert "fractions, from 0 to 1" in refusal(*ask, "inpaint", "--box", 0, 0, "nan", 1)
    assert "hold at least a pixel" in refusal(*ask, "inpaint", "--box", 0.5, 0, 0.5, 1)
    assert "no known pixels" in refusal(*ask, "upscale", "--paste")
    assert "less than the side" in refusal(*ask, "upscale", "--small", 16)
    assert "data:0 to data:999" in refusal("--codes", "data:1000")
    assert "cannot be read" in refusal("--codes", tmp_path / "missing.png")
    assert "cannot be read" in refusal(*ask, "inpaint", "--mask", tmp_path / "missing.png")
    assert "holds no images" in refusal("--codes", tmp_path)
    assert "one thing at a time" in refusal("--codes", "data:1", "--attention", "data:1")
    assert "one class here" in refusal(*ask, "edit", "--classes", "star", "heart")
    assert "is for --npz" in refusal("--rejection", 0.5)
    assert "no --classes" in refusal("--npz", 3, tmp_path / "a.npz", "--classes", "star")
    assert "is a folder" in refusal("--out", tmp_path)
    assert "a seed must be" in refusal("--seed", 10**20)
    assert "less than the side" in refusal(*ask, "upscale", "--small", 0)
    assert "within the last map" in refusal("--attention", "data:3", "--cell", 4, 0)
    assert "a number of images" in refusal("--npz", "many", tmp_path / "a.npz")
    assert not list(tmp_path.iterdir())
