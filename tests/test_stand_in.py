"""Both programs on a device that is not the CPU: nothing is left behind on the CPU, or mixed."""
from __future__ import annotations

import shlex

import pytest
import torch
from program import ROOT, TINY, copied_run, start

pytestmark = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13),
    reason="PyTorch's devices that are written in Python are new, and still change")

CHECKS = f"""
import sys
sys.path[:0] = [{str(ROOT / "tests")!r}, {str(ROOT)!r}]
import stand_in, torch
from program import of_three_codes
from support import evaluation

quantizer = of_three_codes()[0].quantizer
stand_in.install()
here = torch.arange(4.0)
there = here.to("standin")
made = torch.zeros(4, device="standin")
made += there + torch.tensor(1.0)
made[torch.tensor([0, 1])] = 5.0
made.copy_(made + there[torch.tensor([3, 2, 1, 0])])
print(made.tolist(), made.device, (made.cpu() + here).tolist())
for mixed in (lambda: there + here, lambda: here[there.long()], lambda: here.add_(there), there.numpy,
              lambda: there.index_put_((torch.tensor([0]),), here[:1]), lambda: torch.cat([here, there])):
    try:
        mixed()
        print("allowed")
    except (RuntimeError, TypeError) as error:
        print("refused")
quantizer.to("standin").hits_V.copy_(torch.tensor([0.0, 1.0, 1.0]))
residuals = [torch.zeros(2, s * s, 4, device="standin") for s in (1, 2)]
print(quantizer.revive(residuals, torch.optim.AdamW(quantizer.parameters())))
print(quantizer.codebook_VC[0].tolist(), quantizer.hits_V[0].item())
evaluation.CLASSIFIER_STEPS = 20   # more would take long here
for line in sys.argv[1:]:
    stand_in.run(line)
"""


@pytest.fixture(scope="module")
def copy(judged, tmp_path_factory):
    return copied_run(judged, tmp_path_factory.mktemp("stand_in") / "run")


@pytest.fixture(scope="module")
def result(folder, copy):
    """One process for both tests."""
    train = ["train.py", "--data", folder, "--out", copy.parent / "trained", *TINY, "--adversarial-weight",
             "0.5", "--perceptual-weight", "1", "--tokenizer-steps", "6", "--var-steps", "4"]
    run = f"--run {shlex.quote(str(copy))}"
    dozen = " ".join(f"data:{i}" for i in range(12))
    hole = "data:0 data:1 --seeds 0"
    return start(
        "-c", CHECKS, shlex.join(map(str, train)), f"sample.py --per-class 1 {run}",
        f"sample.py progress --per-class 1 --classes star {run}",
        f"sample.py inpaint {dozen} --seeds 0 --particles 2 --judge {run}",
        f"sample.py outpaint {hole} --particles 0 --open-loop {run}", f"sample.py upscale {hole} {run}",
        f"sample.py edit {hole} --class star --particles 2 --paste {run}", f"sample.py codes data:0 {run}",
        f"sample.py teaching data:0 {run}", f"sample.py attention data:0 {run}",
        f"sample.py reconstruct data:0 {run}", f"sample.py explore --classes star {run}",
        f"sample.py evaluate 8 --seeds 0 {run}",
        f"sample.py export 6 {copy}/a.npz --rejection 0.5 --smooth 0 {run}")


def test_tensors_of_two_devices_are_refused(result):
    """And what a GPU allows is allowed: single numbers, copies, numbers of places. At the end dead
    codes move, which takes more steps than the training here has."""
    assert result.stdout.splitlines()[:9] == [
        "[8.0, 7.0, 4.0, 4.0] standin:0 [8.0, 8.0, 6.0, 7.0]", *["refused"] * 6,
        "1", "[0.0, 0.0, 0.0, 0.0] 0.6666666865348816"]


def test_both_programs_put_all_on_the_device(result, copy):
    assert result.returncode == 0, result.stderr
    assert {"grid.png", "edit.png", "explorer.html", "a.npz"} <= {path.name for path in copy.iterdir()}
