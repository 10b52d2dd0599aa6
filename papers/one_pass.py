"""Distilled decoding (arXiv 2412.17153): all tokens from noise, in one pass or in two.

VAR takes a pass for each scale, since a finer one has to know what was drawn. But let every place
have its noise, and a rule that leads from there to a token, by the logits there: then all tokens
follow from the noise, and a student may learn to foretell what the teacher will say, from the class
and the noise of coarser scales. Of teacher and student with the same noise (student.py):

    loss = KL(teacher's softmax || student's), mean over the scales

on what the teacher draws, without any images. Under half of the steps are for two passes, whose
second reads what the first made.

The paper's rule is a flow, so that noise which is alike becomes codes which are alike; VAR's own,
Gumbel-max, would do as well. Which noise is easier to read? (The paper's student returns the code
itself, reads codes for f_hat, and has another mask. A reading of its code for sampling was at hand;
that for training is not published.)

The control learns for as many steps but reads no noise: it draws all scales by the class alone. The
teacher, with whose weights all students begin, is not tuned any further.
"""
from __future__ import annotations

from math import inf
from time import process_time
from timeit import repeat

import numpy as np
import torch
from torch import Tensor

from papers import Claim, Trained, open_runs, parser_of, say_figures, say_verdicts
from papers.student import Distilling, Student, lost, read_by_pass
from support.cli import COUNT, UserError, run_program
from support.evaluation import Judge, evaluated_images, kept_classifier
from support.images import Row, batches, grid, save_picture, to_bytes
from support.presets import RATE

KINDS = ("unread", "flow", "gumbel")
HEADS = ("", "recognised %", "recall %", "Fréchet", "time, one", "time, 100")
CLAIMS = (
    Claim("unfiltered, in one pass by flow noise, 70 % are recognised", (70, inf), (-inf, 70)),
    Claim("by the class alone under 30 %", (-inf, 30), (30, inf)),
    Claim("one image takes under 0.4 of VAR's time", (-inf, 0.4), (0.4, inf)),
    Claim("by flow noise more are recognised than by Gumbel noise", (0, inf), (-inf, 0)),
    Claim("a second pass wins back a third of the Fréchet distance, as in the paper",
          (1 / 3, inf), (-inf, 1 / 3)),
    Claim("and the teacher's scales up to there half of the recognition: points above that half",
          (0, inf), (-inf, 0)),
)


@torch.no_grad()
def from_same_noise(run: Trained, teacher: Student, student: Student, labels_N: Tensor
                    ) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """The teacher's tokens [N, L]; nats lost in one pass [N, L]; and for each scale the student's
    tokens, of two passes of which one starts there, and of that one after the teacher's scales."""
    torch.manual_seed(0)
    quantizer = run.tokenizer.quantizer
    found = []
    for rows in batches(len(labels_N), run.batch):
        labels_B = labels_N[rows].to(run.machine.device)
        noise_BLX = student.noise(len(labels_B))
        own_BL, own_BLV = teacher.drawn(quantizer, labels_B, noise_BLX)
        two, its, led = [], [], []
        for k in teacher.starts:
            student.starts = sorted({0, k})
            two.append(student.drawn(quantizer, labels_B, noise_BLX)[0])
            read_BLC = read_by_pass(quantizer, own_BL, student.starts)
            its.append(student(labels_B, read_BLC, noise_BLX))
            its_BL = student.by_noise(its[k], noise_BLX)
            led.append(torch.where(run.model.level_L < k, own_BL, its_BL))
        found.append([own_BL, lost(own_BLV, its[0]), *two, *led])
    own_NL, lost_NL, *tokens = (torch.cat(parts).cpu() for parts in zip(*found))
    return own_NL, lost_NL, tokens[:len(two)], tokens[len(two):]


def seconds(run: Trained, model: Student) -> list[float]:
    """CPU time of the tokens of 20 images, one at a time, and of 100 at once."""
    labels_N = torch.arange(100, device=run.machine.device) % len(run.classes)

    def draw(size: int) -> None:   # and wait for them, where it is a GPU that draws
        model.drawn(run.tokenizer.quantizer, labels_N[:size], model.noise(size))[0].cpu()

    return [min(repeat(lambda: draw(size), number=number, repeat=3, timer=process_time))
            for size, number in ((1, 20), (100, 1))]


def measure(run: Trained, steps: int, lr: float, second: int, count: int
            ) -> tuple[dict[str, list[float]], dict[str, list[float]], list[Row]]:
    """Of each way to draw how many are recognised, recall, Fréchet distance, and both times as
    shares of VAR's; what is found at each scale; and images that are drawn, of one noise."""
    images, labels_N = evaluated_images(run, count)
    judge = Judge(kept_classifier(run), images, run.classes)
    drawn, by_scale, rows = {}, {}, []
    for kind in KINDS:
        stage = Distilling(run, kind, steps, lr)
        teacher, student = stage.teacher, stage.run()
        own_NL, lost_NL, two, led = from_same_noise(run, teacher, student, labels_N)
        ways = (("all passes", teacher, teacher.starts, own_NL),
                ("two passes", student, [0, second], two[second]),
                ("one pass", student, [0], two[0]))
        for name, model, starts, tokens_NL in ways:
            model.starts = starts
            made = run.decode(tokens_NL)
            found = judge(made, labels_N)
            drawn[f"{kind}, {name}"] = [100 * found.recognised, 100 * found.recall, found.frechet,
                                        *seconds(run, model)]
            rows.append(Row(f"{kind}, {name}", to_bytes(made[::max(1, count // 10)])))
        same_NL = 100 * (two[0] == own_NL).float()
        by_scale[f"{kind}: same tokens %"] = stage.per_scale(same_NL).tolist()
        by_scale[f"{kind}: nats lost"] = stage.per_scale(lost_NL).tolist()
        for name, tokens in (("second pass", two), ("teacher before", led)):
            by_scale[f"{kind}: recognised %, {name}"] = [
                100 * judge(run.decode(x_NL), labels_N).recognised for x_NL in tokens]
    plain = drawn["unread, all passes"][3:]
    for figures in drawn.values():
        figures[3:] = np.divide(figures[3:], plain)
    return drawn, by_scale, rows


def main() -> None:
    parser = parser_of("one_pass", __doc__)
    parser.set_defaults(count=300)
    add = parser.add_argument
    add("--steps", type=COUNT, default=250, help="of each student (default: %(default)s)")
    add("--lr", type=RATE, default=1e-2, help="at its peak (default: %(default)s)")
    add("--second", type=COUNT, default=3, metavar="SCALES",
        help="how many scales the first of two passes draws (default: %(default)s)")
    options = parser.parse_args()
    runs = open_runs(options)
    scales = runs[0].model.config.scales
    if options.second >= len(scales):
        raise UserError(f"--second {options.second} leaves nothing of {len(scales)} scales")
    how = options.steps, options.lr, options.second, options.count
    drawn, by_scale, pictures = zip(*(measure(run, *how) for run in runs))
    rows = say_figures(HEADS, drawn, 2, base="unread, all passes")
    print("unread: noise is not read, all is drawn by the class; with all passes it is plain VAR\n"
          "time: CPU time as a share of that, of one image at a time and of 100 at once")
    found = say_figures(("from scale", *(f"{s}x{s}" for s in scales)), by_scale, 2)
    _, _, alone, own, two, one, _, _, gumbel = rows.values()   # [5, runs] each
    led_R = found["flow: recognised %, teacher before"][options.second]
    say_verdicts(CLAIMS, [
        one[0], alone[0], one[3], one[0] - gumbel[0], (one[2] - two[2]) / (one[2] - own[2]),
        led_R - (one[0] + own[0]) / 2])
    save_picture(options.run[0] / "papers" / "one_pass.png", grid(pictures[0]))


if __name__ == "__main__":
    run_program(main)
