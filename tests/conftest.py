"""Before a test imports Triton: without a GPU its kernels run in Triton's interpreter, on NumPy."""
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import sample  # noqa: E402
from program import TINY, run  # noqa: E402

# The same examples every time; `pytest --hypothesis-profile fresh` looks for new ones.
settings.register_profile("same", derandomize=True, deadline=None, database=None)
settings.register_profile("fresh", max_examples=1000, deadline=None)
settings.load_profile("same")


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A data set of one's own: two classes, several modes and formats, one file that is no image."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for label, name in enumerate(("cat", "dog")):
        (root / name).mkdir()
        for i in range(12):
            pixels = (rng.random((10 + i, 14, 3)) * 100 + 120 * label).astype(np.uint8)
            mode, ending = (("RGB", "jpg"), ("L", "png"), ("RGBA", "webp"), ("P", "png"))[i % 4]
            Image.fromarray(pixels).convert(mode).save(root / name / f"{i:02}.{ending}")
    (root / "dog" / "05.jpg").write_bytes(b"this is no image")
    return root


@pytest.fixture(scope="session")
def finished(folder, tmp_path_factory) -> Path:
    """A whole run on that folder."""
    out = tmp_path_factory.mktemp("run")
    result = run("train.py", "--data", folder, "--out", out, *TINY)
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> Path:
    """A short run on the built-in data: its reconstructions already resemble the images."""
    out = tmp_path_factory.mktemp("shapes")
    result = run("train.py", "--out", out, *TINY, "--image-size", 16, "--scales", "1,2,4",
                 "--multipliers", "1,2,2", "--tokenizer-steps", 150, "--var-steps", 60,
                 "--code-channels", 8)
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture(scope="session")
def judged(shapes, tmp_path_factory) -> Path:
    """The same run, for the pages of papers/, with a classifier that has learned little."""
    out = shutil.copytree(shapes, tmp_path_factory.mktemp("judged") / "run")
    (out / "classifier.pt").unlink(missing_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "CLASSIFIER_STEPS", 20)
        result = run("sample.py", "--run", out, "--evaluate", 40)
    assert result.returncode == 0, result.stderr
    return out
