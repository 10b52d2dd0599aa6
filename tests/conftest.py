"""Before a test imports Triton: without a GPU its kernels run in Triton's interpreter, on NumPy."""
import copy
import gc
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

gc.disable()   # until all is imported, as nothing of it is garbage
sys.path.insert(0, str(Path(__file__).parent.parent))
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# For tensors this small more threads only wait for each other; and sums are rounded by how many.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")   # of the programs that tests start

from program import TINY, ran, run  # noqa: E402

import kernels  # noqa: E402
from sample import load_run  # noqa: E402
from support.data import draw_shapes  # noqa: E402
from support.devices import choose_machine  # noqa: E402
from support.evaluation import kept_classifier  # noqa: E402

# The same examples every time; `pytest --hypothesis-profile fresh` looks for new ones.
settings.register_profile("same", derandomize=True, deadline=None, database=None)
settings.register_profile("fresh", max_examples=1000, deadline=None)
settings.load_profile("same")


def pytest_collection_finish():
    """What is imported by now is no garbage, and looking for it there takes a while each time."""
    gc.freeze()
    gc.set_threshold(50_000)
    gc.enable()


@pytest.fixture(autouse=True, scope="session")
def a_language_that_stays_replaced():
    """Triton's interpreter looks through its whole language for what to replace, at every launch
    and at every call inside of it, and puts it back: that takes half the time of small kernels."""
    if not kernels.HAS_TRITON or torch.cuda.is_available():
        yield
        return
    from triton.runtime import interpreter
    tl = kernels.tl
    replaced = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", lambda _: SimpleNamespace(restore=lambda: None))
        yield
    if replaced:   # Triton 3.5 leaves its language replaced
        replaced.restore()


@pytest.fixture(autouse=True, scope="session")
def seeds_of_the_cpu_alone():
    """Of every seed PyTorch keeps a traceback for each kind of device that might still be used."""
    with pytest.MonkeyPatch.context() as patch:
        for name in () if torch.cuda.is_available() else ("cuda", "xpu", "mtia"):
            patch.setattr(f"torch.{name}.manual_seed_all", lambda seed: None, raising=False)
        yield


def no_curves(*_) -> Image.Image:
    return Image.new("L", (1, 1))


@pytest.fixture(autouse=True)
def no_curves_and_no_collection(monkeypatch):
    """Drawing curves takes a third of a tiny run's time: only runs that tests share have them.
    And between its stages a run looks for garbage among all that the tests have loaded by then."""
    monkeypatch.setattr("support.watching.draw_curves", no_curves)
    monkeypatch.setattr("train.gc", SimpleNamespace(collect=lambda: 0))


@pytest.fixture(autouse=True)
def a_cpu_unless_asked(monkeypatch):
    """Programs that are not told a device take the same on every machine."""
    cuda = SimpleNamespace(is_available=lambda: False)
    monkeypatch.setattr(
        "support.cli.torch", SimpleNamespace(cuda=cuda, OutOfMemoryError=torch.OutOfMemoryError))


@pytest.fixture(name="run")
def copied_run(opened):
    """Of the run that a module opens, a copy whose model a test may change."""
    return replace(opened, model=copy.deepcopy(opened.model))


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A data set of one's own: two classes, several modes and formats, one that is no image."""
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
def judged(tmp_path_factory) -> Path:
    """A shorter run on a twentieth of that data, for the pages of papers/, and a classifier that
    has learned little."""
    out = tmp_path_factory.mktemp("judged") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("support.evaluation.CLASSIFIER_STEPS", 20)
        patch.setattr("support.watching.draw_curves", no_curves)
        patch.setattr("support.data.draw_shapes",
                      lambda count, side, seed: draw_shapes(count // 20, side, seed))
        ran("train.py", "--out", out, *TINY, "--image-size", 16, "--multipliers", "1,2,2",
            "--code-channels", 8, "--edge-weight", 0, "--smaller-weight", 0, "--tokenizer-steps", 24,
            "--var-steps", 16)
        kept_classifier(load_run(out, choose_machine("cpu")))
    return out
