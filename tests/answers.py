"""Model answers to the open questions: the experiment of the hand-out as it stands, and what of it.

    python tests/assignments.py answers 7 --run out/shapes

For lecturers. What is said here has no numbers of a training: the experiment prints them, of that
run and on that machine. It takes as long as a student's, with trainings up to half an hour.
"""
from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

from functions import path_of, text_of, with_body
from handouts import Assignment

COMMANDS = re.compile(r"^(python |T=|for .*; do$)", re.MULTILINE)     # a block's, of the shell
CHANGED = {     # where a hand-out says "# changed": the function's name, and what for what
    2: ("tokenizer.Quantizer.forward", ("loss = loss + codes_loss", "loss = codes_loss"),
        ("loss / len(self.scales)", "loss")),
    4: ("tokenizer.Quantizer.teacher_inputs",
        ("self.accumulate(f_hat_BCSS, tokens_Bl, k)",
         "self.accumulate(self.initial(len(tokens_BL)), tokens_Bl, k)")),
}


def experiment(assignment: Assignment, folder: Path) -> str:
    """What the programs of the question print, in a copy of the repository, and what they log."""
    shell: list[str] = []
    question = textwrap.dedent(assignment.question)
    for block in re.findall(r"(?:^(?: {4}.*)?\n)+", question, re.MULTILINE):
        block = textwrap.dedent(block).strip()
        begin = COMMANDS.search(block)
        script = block[:begin.start()] if begin else block
        named = re.match(r"# (\w+\.py)\n", script)
        if named:
            (folder / named[1]).write_text(script, "utf-8")
        if begin:
            shell += block[begin.start():].splitlines()
        elif named:
            shell.append(f"python {named[1]}")
    if assignment.number in CHANGED:
        name, *pieces = CHANGED[assignment.number]
        file = folder / path_of(name)
        body = text_of(file.read_text("utf-8"), name)
        for old, new in pieces:
            body = body.replace(old, new)
        changed = with_body(file.read_text("utf-8"), name, body)
        file.with_suffix(".changed").write_text(changed, "utf-8")
        change = f"cp {file.with_suffix('.changed')} {file}"
        shell = [line for each in shell for line in [change] * ("# changed" in each) + [each]]
    python = f'python() {{ {shlex.quote(sys.executable)} "$@"; }}'
    done = subprocess.run(["bash", "-e", "-c", "\n".join([python, *shell])], cwd=folder, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if done.returncode:
        raise OSError(f"the experiment failed: {done.stderr[-500:]}")
    return "\n".join([done.stdout.strip(), *map(last_line, sorted(
        log for log in folder.glob("out/*/log.jsonl") if log.parent.name != "shapes"))])


def last_line(log: Path) -> str:
    """What a training logged last of held-out images."""
    lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    last = [line for line in lines if line["split"] == "held_out"][-1]
    values = {name: [round(x, 3) for x in value] if isinstance(value, list) else round(value, 3)
              for name, value in last.items() if name not in ("stage", "step", "split")}
    return f"{log.parent.name}, {last['stage']}, held out at step {last['step']}: " + ", ".join(
        f"{name} {value}" for name, value in values.items())


ANSWERS = {number: textwrap.dedent(text).strip() for number, text in {
    1: """
        Compare the last rows first: the finest map is not enlarged, so interpolation blurs nothing
        there, and phi can only change how its codes are added: with a bias and a 3 x 3
        neighbourhood, a filter that the encoder could as well have learned. What phi repairs is in
        the rows before. A code of a coarse map covers many places, and phi may sharpen what
        interpolation made of it; the scales after it need not correct that. One training of each
        shows an effect only where it is larger than between two seeds, and the same steps for all
        do not show who would win in the end. With strength 1 nothing goes around the convolution,
        so it may also be worse.
    """,
    2: """
        Held to the latent only at the end, the sum may take any way there: a coarse map needs to be
        no image of its own, its PSNR alone falls, and codes of the finest map carry nearly all. The
        last row may even gain, since nothing else is asked for. The pictures of the first map show
        it: with every scale in the loss it is the image, blurred; with the last alone, patches that
        have no meaning before others correct them. The transformer would rather predict the first:
        a coarse token that says what the image is like is worth most, because all later scales read
        it, while arbitrary coarse tokens must be learned as a code, and the fine ones then carry
        more bits than can be drawn independently within one scale.
    """,
    3: """
        "Used at all" counts a code that one image of a thousand hits; perplexity is the number of
        codes that would be as uncertain if all were hit alike, so it sees a few that take nearly
        everything. Codes of a good start are where residuals were, and few die at this size: used
        codes may be nearly equal, and perplexity and PSNR decide. Without the good start most codes
        lie where no residual is, never win, get no gradient and stay: there revival is all that
        there is. So with both, each hides what the other does; take both away to see. With 4096
        codes each is hit less, the encoder moves away from more of them, and revival matters more.
        Per scale: a coarse map cannot use more codes than there are images.
    """,
    4: """
        At the first scale there is no difference: both read the class. At the second there is none
        either but chance, since the sum after one map is that map. From the third on f_hat holds
        what a single map does not. The difference is largest at the finest scale, where most has
        been summed up; between, one scale may show next to none. Attention to the coarser scales
        does not make up for it: a token would have to find, out of all coarser places, those that
        cover its own, and add their codes as phi and interpolation would; f_hat at its place is
        that sum, without a layer spent. Samples fail because generation reads another thing than
        training taught (a shift between training and use), however good the loss is.
    """,
    5: """
        A token that sees its own scale alone still reads f_hat at its place: the sum of all coarser
        maps, so it is not blind. What it lacks is the class's and the coarser maps' features as
        later layers have them. The pairs of `KeyRanges` say what could be saved: sum the widths of
        the ranges for None, 2 and 1. Own scale alone saves 38 % of the pairs at 103 tokens and 61 %
        at 680. At 103 scores are a small part of a step, next to products with weights, so the time
        hardly changes; the pairs grow with the square of the length and the products with the
        length, so at 680 it begins to matter.
        Markov models of this kind were published (papers/hmar.py).
    """,
    6: """
        At a small rate the two train alike. At a large one the products of plain queries and keys
        grow, the softmax turns into a choice of one, its gradient vanishes, and the loss sticks or
        jumps; unit queries and keys bound a score by the learned scale, at most 100, whatever the
        weights do. Measure it: `project` of the first and of the last layer, the largest q.k times
        the scale. With Muon, as here, updates have a bounded size, so that the two may differ
        little at either rate: then say so. In 30 layers the stream grows with depth, with it what
        is projected, and one layer whose attention collapses is enough to spoil the run.
    """,
    7: """
        t = cfg k / (K - 1), at a growth of 1, is 0 at the first scale: the first token is drawn
        from the class as it is, so the count of different first tokens is the same for every cfg
        (the same seed draws the same tokens). Constant guidance presses the first map to be
        typical, the number falls as cfg grows, and with it the distance between images of a class
        after the first scales. After all scales the difference is small or none: the distance of
        pixels is mostly edges and places, which the finest maps settle in both. A measure of the
        whole image does not see where variety is lost; pictures and the first maps do. It grows
        because coarse scales choose among images and fine ones only have to fit.
    """,
    8: """
        Nats per token fall as p does, since unlikely tokens are not drawn: all that is known
        of rare ones is lost. The distance of pixels hardly moves: images of a class differ by
        place, size and colour, which a few likely tokens can say. Count what is drawn where the
        choice is: of the first tokens fewer differ, the smaller p is. Where samples are as likely
        as held-out images p is near 1, as it should be if the model is calibrated; they look best
        below that, because the tokens of a scale are drawn independently, and what cannot be
        agreed upon is better not drawn at all at the fine scales. That is why the default falls
        from 1 at the first scale.
    """,
    9: """
        PyTorch writes every step; the profiler or a TorchDispatchMode lists them. In fp32 they are
        three: the gated sum (addcmul, 12 bytes a number), the norm (8), scale and shift (addcmul,
        8), together 28. In bf16 there are casts between them: 12, 12, 6, 6, 8, 8 and 6, together
        58, more than in fp32 and not less, as it computes in fp32. A kernel reads x and h and
        writes the sum and y: in fp32 16 bytes for each number, in bf16 8. So bytes alone promise
        1.75 and 7.25 times the speed. The ratio bounds the speed-up from bytes alone. A GPU would
        not show it exactly: small arrays stay in the L2 cache between two steps, and the launch of
        each step costs a time that has nothing to do with bytes; and a row in one program leaves
        other limits.
    """,
    10: """
        bf16 keeps 8 binary places, and the best two codes are often nearer to each other than a
        rounded product can tell. At the first scale nothing else can change a token: that row is
        rounding alone. From then on a changed token changes f_hat, and so what the finer scales are
        asked for, and the share grows. The images are hardly worse: finer scales code what the
        wrong token left over, and the last code nearly as good. It matters all the same: the
        transformer learns the tokens of one encoder, its inputs come from the same, and published
        models can only be reproduced with the codes that they were made with.
    """,
    11: """
        A tile is visited if any pair in it is kept, so the share visited is that kept (sum of the
        widths of `KeyRanges` by L times L) and a rim along the staircase as wide as a tile. The rim
        is of the order of L times the tile, of L squared: it shrinks as L grows and as tiles do,
        and so does the share that is cut, which is the rim alone. The smallest tile is not the
        fastest: a tile of T queries loads every key and value in range once, so bytes per query go
        with 1 / T, and 16 x 16 products leave most of a tensor core unused. With last_scales=1 only
        squares along the diagonal are left: the sum of s to the fourth by L squared, and a rim.
    """,
    12: """
        The second kernel tiles the transposed table, so a tile of queries by keys visits what the
        first would with its sides exchanged. Products: forward two in each tile (q k, weights v);
        the first kernel three (q k again, do v, ds k), the second four (q k and do v again, then
        dv and dk): seven, of which two pairs are the same numbers. Had weights been kept, q k would
        be spared in both. Keeping them takes B H L L numbers of two bytes: 64 x 16 x 680 x 680 x 2,
        about 0.95 GB for each layer, written and read twice. At D 64 a product of q k costs 2 D
        operations a number, and reading it 2 bytes: with 1000 operations in the time of a byte,
        computing again costs 0.06 of what reading takes.
    """,
    13: """
        In the closed loop a token of the known part stands for what the image has more than what
        was made so far, so later scales mend what generated tokens beside it, enlarged and through
        phi, spilled over. In the open loop the image's own tokens are put as they were computed,
        and what spilled stays. It shows where the hole lies in the middle, with much border. With
        half an image or a corner the two hardly differ: coarse maps are known in the hole too (the
        quarter rule), so little is spilled, and most of the known part is far from it. Two seeds
        each, one after the other, tell what is chance. Known is not exact in either: the larger
        part of the error is what tokens cannot say, compare `python sample.py reconstruct`; cells
        on the border are known in part, and the decoder looks at its neighbourhood. `--paste` puts
        the pixels back: the error is then 0, and a step at the border that was not closed stays.
    """,
}.items()}
