"""Draw with a trained run, and look into it:  python sample.py

    python sample.py                                 a grid of images, a row per class
    python sample.py --classes star heart --per-class 12 --seed 7
    python sample.py progress                        what an image looks like after each scale
    python sample.py inpaint data:3 data:5 --box 0.5 0 1 1 --seeds 0 1 2
    python sample.py codes data:3                    an image's token maps, and what each adds
    python sample.py explore                         a page to touch, for a browser
    python sample.py evaluate 1000                   how good the images are, in figures
    python sample.py export 50000 samples.npz        for the field's evaluation programs
    python sample.py --published d16 --classes 207 980

train.py writes a run's folder, out/shapes for one; a published pair will do.
`python sample.py --help` names all commands.

Read `main`, then `Run`, then `Known`: in-painting, out-painting, editing and upscaling are one
mechanism.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, asdict, dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import TensorDataset

from support.asked import Given, asked_class, asked_classes, class_indices, load_images
from support.checkpoint import (
    blaming, check_finite, fingerprint, read_tensors, restored, unfinished,
)
from support.cli import UserError, run_program
from support.commands import TOKENIZER_ALONE, parse
from support.data import load_held_out
from support.devices import Machine, check_memory, choose_machine, pack, say_once
from support.evaluation import evaluate, say_evaluation
from support.explorer import explore
from support.figures import draw_attention, draw_codes, draw_teaching, reconstruct, scale_names
from support.holes import (
    from_small, judge_completions, judge_of, known_pixels, say_completion, share_of_known,
)
from support.images import (
    Row, at_a_time, batches, grid, rows_of_classes, save_film, save_npz, save_picture, save_told,
    to_bytes,
)
from support.published import class_names, published_pair
from tokenizer import Quantizer, Tokenizer, TokenizerConfig
from var import VAR, VARConfig


def main() -> None:
    options = parse(asdict(DEFAULTS), of_published=asdict(PUBLISHED),
                    unsmoothed=asdict(UNSMOOTHED))
    machine = choose_machine(options.device, options.precision, options.compile)
    sampling = Sampling(options.cfg, options.top_k, options.top_p, options.growth,
                        options.smooth, options.batch)
    tokenizer = options.tokenizer
    var = options.var
    if options.published:
        tokenizer, var = published_pair(options.published)
    run = load_run(options.run, machine, sampling, tokenizer, var,
                   options.command in TOKENIZER_ALONE)
    if run.model and machine.dtype != torch.float32:
        run.model.cast_layers(machine.dtype)
    elif run.model and machine.device.type == "cpu" and not machine.compile:
        pack(run.model)

    match options.command:
        case "evaluate":
            found = evaluate(run, options.count, options.seeds)
            say_evaluation(found, options.count, options.seeds, sampling)
            return
        case "explore":
            labels = options.classes and class_indices(options.classes, run.classes)
            explore(run, options.out or run.folder / "explorer.html", labels, options.seed)
            return
        case "export":
            if options.reference:
                save_npz(options.reference, run.held_out_images().permute(0, 2, 3, 1).numpy())
            save_npz(options.file, draw_many(run, options.count, options.seed, options.rejection))
            return
        case "grid":
            picture = draw_samples(run, options.classes, options.per_class, options.seed)
        case "progress":
            picture = draw_progress(run, options.classes, options.per_class, options.seed)
        case "codes":
            picture = draw_codes(run, load_images(run, options.images))
        case "teaching":
            picture = draw_teaching(run, load_images(run, options.images))
        case "attention":
            given = load_images(run, options.images)
            label = asked_class(run, options.class_name, given.labels[0])
            picture = draw_attention(run, given.images, label, options.cell)
        case "reconstruct":
            picture = reconstruct(run, load_images(run, options.images))
        case _:   # images are completed
            known_HW = None
            if options.command != "upscale":
                config = run.tokenizer.config
                known_HW = known_pixels(options.mask or options.box, config.image_side,
                                        options.command != "outpaint", config.scales[-1])
            label = asked_class(run, options.class_name)
            picture = complete(
                run, load_images(run, options.images), known_HW, label, options.seeds,
                options.small, options.open_loop, options.paste, options.particles, options.judge)
    path = options.out or run.folder / f"{options.command}.png"
    save_picture(path, grid(picture, options.cell_size, run.note), save_told)
    if options.gif:   # now the picture is there, whatever becomes of the film
        save_film(options.gif, picture, options.per_class, options.cell_size, run.note)


# --------------------------------------------------------------------------------------------------
# A run


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn."""
    cfg: float         # strength of classifier-free guidance at the last scale; 0 is none
    top_k: int         # draw from the k most likely tokens; 0 is no limit
    top_p: float | tuple[float, float]   # draw from the most likely tokens that hold so much; of
                                         # the first and of the last scale, if they differ
    growth: float = 1.0   # guidance and smoothing grow, and top_p falls, with this power of
                          # k / (K - 1)
    smooth: float = 0.0   # how much of a code makes way for the mean code, at the last scale
    batch: int | None = None   # images at a time; None leaves it to Run.batch


# These trade variety for clean shapes, and do so at the fine scales, which only have to fit: the
# coarse ones decide what is drawn. Completing images and the explorer need codes, and have filters
# chosen without smoothing. Presets may have their own. Published models are drawn from as their
# FID is measured.
DEFAULTS = Sampling(cfg=0.6, top_k=900, top_p=(1.0, 0.4), growth=3.5, smooth=1.0)
UNSMOOTHED = Sampling(cfg=1.0, top_k=900, top_p=(1.0, 0.1), growth=2.0)
PUBLISHED = Sampling(cfg=1.5, top_k=900, top_p=0.96)


@dataclass
class Run:
    """A tokenizer and a transformer that belong together, and how to use them."""
    folder: Path                        # where its pictures and its classifier lie
    tokenizer: Tokenizer
    model: VAR | None                   # None for a tokenizer alone
    classes: list[str]
    held_out: TensorDataset | None      # bytes [N, channels, side, side] and labels [N]
    machine: Machine
    sampling: Sampling
    _: KW_ONLY
    note: str = ""                      # of a training that is not finished: its step
    white: int | None = None            # of files of 16 bits: see --white-level
    data_set: str | None = None         # a digest of the images that were trained on

    @property
    def batch(self) -> int:
        """Return how many images to draw at a time: as told; else as many as keep their keys and
        values within 4 GB, half of a small GPU, and at most 100."""
        config = self.model.config
        numbers = 2 * config.depth * config.length * config.width
        copies = 2 if self.sampling.cfg else 1
        of_image = numbers * self.machine.dtype.itemsize * copies
        return self.sampling.batch or max(1, min(100, 4 * 10**9 // of_image))

    @torch.no_grad()
    def generate(
        self, labels: list[int], seed: int, known_of: Callable[[slice], Known] | None = None,
        keep: Callable[[list[Tensor]], None] | None = None,
    ) -> Tensor:
        """Return tokens [N, L] of one image per label, on the CPU.
        known_of: returns what is known of some of the N images, which then are not smoothed. keep:
        takes the latents [B, C, S, S] of B of them after each scale."""
        device = self.machine.device
        sampling = self.sampling
        smooth = 0.0 if known_of else sampling.smooth
        generator = torch.Generator(device).manual_seed(seed)
        labels_N = torch.tensor(labels)
        tokens = []
        for rows in batches(len(labels), self.batch, "generate"):
            labels_B = labels_N[rows].to(device)
            # Guidance away from "any class" means nothing where no class is asked for.
            no_class = (labels_B == self.model.config.classes).all()
            cfg = 0.0 if no_class else sampling.cfg
            if (no_class or cfg) and not self.model.config.label_dropout:
                say_once("note: this model was trained without label dropout and never saw the "
                         "null class, which guidance (--cfg) and completing without a class use")
            known = None if known_of is None else known_of(rows)
            latents = []
            # A `generate` of papers/ may take neither.
            more = dict(smooth=smooth, latents=latents) if smooth or keep else {}
            with self.machine.autocast():
                tokens_BL = self.model.generate(
                    self.tokenizer, labels_B, cfg, sampling.top_k, sampling.top_p, generator,
                    known, sampling.growth, **more)
            tokens.append(tokens_BL.cpu())
            if keep:
                keep(latents)
        return torch.cat(tokens)

    def draw(self, labels: list[int], seed: int) -> tuple[Tensor, Tensor]:
        """Return tokens [N, L] of one image per label, and what `decode` makes the images of: them,
        or latents [N, C, S, S] if these are smooth."""
        if not self.sampling.smooth:
            tokens_NL = self.generate(labels, seed)
            return tokens_NL, tokens_NL
        last = []
        tokens_NL = self.generate(labels, seed, keep=lambda latents: last.append(latents[-1].cpu()))
        return tokens_NL, torch.cat(last)

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return latents [N, C, S, S] and tokens [N, L], on the CPU."""
        latents = []
        tokens = []
        for some in images.split(at_a_time(images.shape[-1])):
            f_BCSS = self.tokenizer.latent(some.to(self.machine.device))
            latents.append(f_BCSS.cpu())
            tokens.append(self.tokenizer.quantizer.encode(f_BCSS).cpu())
        return torch.cat(latents), torch.cat(tokens)

    def decode(self, drawn: Tensor) -> Tensor:
        """Return images, on the CPU, of tokens [N, l] of all scales, or of the first few; or of
        latents [N, C, S, S]."""
        return torch.cat([images.cpu() for images in self.rendered(drawn)])

    def decode_to_bytes(self, drawn: Tensor) -> np.ndarray:
        """Return the same as bytes [N, side, side, channels], a quarter as much to copy from a
        GPU."""
        return np.concatenate([to_bytes(images) for images in self.rendered(drawn)])

    def rendered(self, drawn: Tensor) -> Iterator[Tensor]:
        """Yield images on the device, some at a time.

        Where convolutions are chosen or compiled for a shape, every pass has the same: padding
        makes the last one full.
        """
        machine = self.machine
        size = min(len(drawn), at_a_time(self.tokenizer.config.image_side))
        for some in drawn.split(size):
            B = len(some)
            if machine.device.type == "cuda" or machine.compile:
                some = F.pad(some, (0, 0) * (some.ndim - 1) + (0, size - B))
            some = some.to(machine.device)
            with torch.no_grad(), machine.autocast():
                if not some.is_floating_point():
                    some = self.tokenizer.quantizer.decode(some)
                images = self.tokenizer.render(some).clamp(-1, 1)
            yield images[:B]

    def after_each_scale(self, tokens_NL: Tensor) -> list[np.ndarray]:
        """Return what 1, 2, ... K scales decode to: bytes [N, side, side, channels] for each."""
        ends = accumulate(s * s for s in self.tokenizer.config.scales)
        return [self.decode_to_bytes(tokens_NL[:, :end]) for end in ends]

    def log_likelihood(self, tokens_NL: Tensor, labels: list[int]) -> Tensor:
        """Return log p(tokens | class) [N], in nats, without guidance."""
        return self.log_likelihoods(tokens_NL, labels).sum(dim=1)

    @torch.no_grad()
    def log_likelihoods(self, tokens_NL: Tensor, labels: list[int]) -> Tensor:
        """Return log p of each token, given the coarser scales: [N, L]."""
        device = self.machine.device
        labels_N = torch.tensor(labels)
        likelihoods = []
        for rows in batches(len(labels), self.batch, "likelihood"):
            tokens_BL = tokens_NL[rows].to(device)
            labels_B = labels_N[rows].to(device)
            with self.machine.autocast():
                logits_BLV = self.model(labels_B, self.tokenizer.teacher_inputs(tokens_BL))
            logits_NV = logits_BLV.float().flatten(0, 1)
            nats_N = F.cross_entropy(logits_NV, tokens_BL.flatten(), reduction="none")
            likelihoods.append(-nats_N.view_as(tokens_BL).cpu())
        return torch.cat(likelihoods)

    def held_out_images(self) -> Tensor:
        if self.held_out is None:
            raise UserError(f"{self.folder} has no held_out.pt of its data, whose first image is "
                            f"data:0; train.py --resume, with its --data, writes it anew")
        return self.held_out.tensors[0]


def load_run(folder: Path, machine: Machine, sampling: Sampling = DEFAULTS,
             tokenizer: Path | None = None, var: Path | None = None, alone: bool = False) -> Run:
    """Load a run that train.py wrote. tokenizer, var: other checkpoints than the folder's; with
    `var` goes the tokenizer beside it, if any. alone: no transformer, unless one is named.

    Raises UserError where the tokenizer and the transformer do not belong together.
    """
    if var and (var.parent / "tokenizer.pt").exists():
        folder = var.parent
    tokenizer_path = tokenizer or folder / "tokenizer.pt"
    var_path = var or folder / "var.pt"
    if alone and var is None:
        return load_alone(tokenizer_path, machine, sampling)
    if var is None and not var_path.exists():
        how = "python train.py makes a run, in out/shapes or where --out says"
        if tokenizer is None and tokenizer_path.exists():
            how = "train.py --resume goes on to train it; reconstruct and codes need none"
        raise UserError(f"there is no transformer at {var_path} yet: {how}")
    ours = var_path.suffix == ".pt"   # published ones are .pth, .safetensors and so on
    with blaming(var_path):
        if ours:
            model, content = restored(var_path, "transformer", VAR, VARConfig)
            classes = content["classes"]
            white = content.get("white")
            learned_from = content["made_with"]["tokenizer"]
            data_set = content["made_with"].get("data set")
            note = unfinished(content, "var_steps")
        else:
            model = VAR.from_official(read_tensors(var_path, "published checkpoint"))
            check_finite(model.state_dict())
            classes = class_names(model.config.classes)
            learned_from, data_set, note, white = None, None, "", None
    tokenizer = load_tokenizer(tokenizer_path, model.config.scales)
    if learned_from not in (None, fingerprint(tokenizer)):
        raise UserError(f"{var_path} was trained on the tokens of another tokenizer than "
                        f"{tokenizer_path}")
    for name in ("scales", "vocabulary", "code_channels"):
        found = getattr(tokenizer.config, name)
        expected = getattr(model.config, name)
        if found != expected:
            raise UserError(f"{var_path} expects {name.replace('_', ' ')} {expected}, and "
                            f"{tokenizer_path} has {found}")
    held_out = None
    if ours:   # published models come without images
        held_out, _ = load_held_out(var_path.parent, tokenizer.config, data_set)
    tokenizer = placed(tokenizer, machine)
    model.to(machine.device).eval()
    if machine.compile:
        model.compile_layers()
    return Run(var_path.parent, tokenizer, model, classes, held_out, machine, sampling,
               note=note, white=white, data_set=data_set)


def load_alone(path: Path, machine: Machine, sampling: Sampling) -> Run:
    """Load a tokenizer without a transformer, and the held-out images beside it."""
    if path.suffix != ".pt":
        tokenizer = placed(load_tokenizer(path), machine)
        return Run(path.parent, tokenizer, None, [], None, machine, sampling)
    tokenizer, content = restored(path, "tokenizer", Tokenizer, TokenizerConfig)
    held_out, classes = load_held_out(path.parent, tokenizer.config)
    return Run(path.parent, placed(tokenizer.eval(), machine), None,
               classes or content["classes"], held_out, machine, sampling,
               note=unfinished(content, "tokenizer_steps"), white=content.get("white"))


def placed(tokenizer: Tokenizer, machine: Machine) -> Tokenizer:
    tokenizer.to(machine.device)
    if machine.device.type == "cuda":
        tokenizer.cast_decoder(machine.dtype)
    if machine.compile:
        tokenizer.decoder.compile(dynamic=False)
    return tokenizer


def load_tokenizer(path: Path, scales: tuple[int, ...] | None = None) -> Tokenizer:
    """Load a tokenizer of ours, or a published one, whose scales the caller may name."""
    if path.suffix == ".pt":
        return restored(path, "tokenizer", Tokenizer, TokenizerConfig)[0].eval()
    with blaming(path):
        content = read_tensors(path, "published checkpoint")
        tokenizer = Tokenizer.from_official(content, scales)
        check_finite(tokenizer.state_dict())
        return tokenizer


# --------------------------------------------------------------------------------------------------
# Drawing images of classes


def draw_samples(run: Run, names: list[str] | None, per_class: int, seed: int) -> list[Row]:
    """Return a row of images for each class; names: None is all, at most 20."""
    names, labels = asked_classes(run, names, per_class)
    _, drawn = run.draw(labels, seed)
    return rows_of_classes(names, run.decode_to_bytes(drawn))


def draw_progress(run: Run, names: list[str] | None, per_class: int, seed: int) -> list[Row]:
    """Return a row for each image: what it looks like after each scale."""
    names, labels = asked_classes(run, names, per_class)
    kept = []
    run.generate(labels, seed, keep=kept.append)
    frames_KN = [run.decode_to_bytes(torch.cat(latents)) for latents in zip(*kept)]
    captions = scale_names(run.tokenizer.config.scales)
    rows = zip(np.repeat(names, per_class), zip(*frames_KN))
    return [Row(label, frames_K, captions) for label, frames_K in rows]


def draw_many(run: Run, count: int, seed: int, rejection: float) -> np.ndarray:
    """Draw bytes [count, side, side, channels], balanced over the classes.

    rejection: a share f. Below 1, count / f are drawn, and of each class those kept that are most
    likely under the transformer without guidance. (The paper's best were chosen by a classifier.)
    """
    side = run.tokenizer.config.image_side
    classes = len(run.classes)
    wanted = [len(range(label, count, classes)) for label in range(classes)]
    counts = [math.ceil(n / rejection) for n in wanted]
    latent_bytes = run.tokenizer.quantizer.initial(1).nbytes * bool(run.sampling.smooth)
    check_memory(6 * count * side**2 + 2 * latent_bytes * sum(counts),
                 f"{count} samples, and a copy in another order,")
    labels = np.repeat(range(classes), counts).tolist()
    tokens_NL, drawn = run.draw(labels, seed)
    if rejection < 1:
        likelihood_N = run.log_likelihood(tokens_NL, labels)
        best = []
        by_class = zip(drawn.split(counts), likelihood_N.split(counts), wanted)
        for drawn_n, likelihood_n, count_of_class in by_class:
            best.append(drawn_n[likelihood_n.topk(count_of_class).indices])
        drawn = torch.cat(best)
    return run.decode_to_bytes(drawn)


# --------------------------------------------------------------------------------------------------
# Completing images: in-painting and its kin


@dataclass
class Known:
    """Puts what is known of images in place of what is drawn (paper: zero-shot tasks).

    The transformer needs no training for it: at every scale, tokens that it drew where the image is
    known make way for the image's own, and all later scales read them.

    latent_BCSS: the latent of the images, with something plausible in the holes.
    where_B1SS: the share of each place that is known.
    known_scales: at how many of the scales, from the coarsest, anything is known.
    own_tokens_BL: if given, the images' tokens, computed beforehand, are put as they are: the open
        loop, as the authors do.
    known_from: the share from which a cell of a coarse map counts as known; the others are drawn,
        see `most_likely`. 0 is the quarter rule of `mask`.
    """
    latent_BCSS: Tensor
    where_B1SS: Tensor
    known_scales: int
    own_tokens_BL: Tensor | None = None
    known_from: float = 0.0

    def put(self, drawn_Bl: Tensor, quantizer: Quantizer, f_hat_BCSS: Tensor, k: int) -> Tensor:
        """Return tokens [B, l] of scale k: the images' own where known, else those drawn."""
        own_Bl = self.tokens(quantizer, f_hat_BCSS, k)
        return torch.where(self.mask(quantizer, k), own_Bl, drawn_Bl)

    def tokens(self, quantizer: Quantizer, f_hat_BCSS: Tensor, k: int) -> Tensor:
        """Return the images' own tokens of scale k: [B, l].

        Those of `encode` stand for what the image's own coarser scales left over. Here some of the
        coarser tokens were generated, and f_hat with them, so the loop is closed: a token stands
        for what the image has more than f_hat.
        """
        if self.own_tokens_BL is not None:
            return quantizer.split(self.own_tokens_BL)[k]
        return quantizer.nearest(quantizer.read(self.latent_BCSS - f_hat_BCSS, k))

    def mask(self, quantizer: Quantizer, k: int) -> Tensor:
        """Return which tokens of scale k are known: bool [B or 1, l].

        The tokens of a scale are drawn independently, so a generated one learns only from coarser
        scales what is known around it. Hence the quarter rule: on maps of up to a quarter of the
        finest side, where a cell covers 4 x 4 of the finest or more, all cells are known, in the
        holes too (if anything is). They say how large forms and colours go on there, and leave to
        the finer maps what is seen in them. On those, cells of which any part is known; and on the
        finest, those of which half is, so that a hole ends where it was asked to. With `known_from`
        one share makes cells known on all maps but the finest.
        """
        s = quantizer.scales[k]
        S = quantizer.scales[-1]
        share_Bl = quantizer.read(self.where_B1SS, k).squeeze(-1)
        if k >= self.known_scales:
            return torch.zeros_like(share_Bl, dtype=torch.bool)
        if s == S:
            return share_Bl >= 0.5
        if self.known_from:
            return share_Bl >= self.known_from
        if 4 * s <= S:
            share_Bl = share_Bl.amax(dim=1, keepdim=True).expand_as(share_Bl)
        return share_Bl > 0


def complete(
    run: Run, given: Given, known_HW: Tensor | None, label: int, seeds: Sequence[int],
    small_side: int | None = None, open_loop: bool = False, paste: bool = False,
    particles: int = 0, judge: bool = False,
) -> list[Row]:
    """Return a row for each image: the original, what is known of it, and a result per seed.

    known_HW: 1 where images are known and 0 where they are generated; None: everywhere, but the
        coarse scales alone, of images averaged down to `small_side`.
    open_loop: see `Known`. paste: put the known pixels over the results.
    particles: how many results to choose each from, see `most_likely`; 0 is a single one, whose
        coarse maps are those of the filled image.
    judge: print how good they are, too, as `evaluate` does.
    """
    images = given.images
    device = run.machine.device
    judges = judge and judge_of(run, given)   # before anything is drawn
    if known_HW is None:
        filled, known_scales = from_small(images, small_side, run.tokenizer.config)
        known_HW = torch.ones(images.shape[2:])
        shown = filled
    else:
        filled = fill_holes(images, known_HW)
        known_scales = len(run.tokenizer.config.scales)
        shown = images * known_HW
    latent_NCSS, tokens_NL = run.encode(filled)
    where_11SS = F.interpolate(known_HW[None, None], size=latent_NCSS.shape[2:], mode="area")
    where_11SS = where_11SS.to(device)

    image_M = torch.arange(len(images)).repeat_interleave(max(1, particles))
    labels = [label] * len(image_M)
    null_class = len(run.classes)
    if label == null_class and null_class <= particles:   # try the classes in turn
        labels = [i % null_class for i in range(particles)] * len(images)

    known_from = share_of_known(known_HW, paste) if particles else 0.0

    def known_of(rows: slice) -> Known:
        image_B = image_M[rows]
        own_tokens_BL = tokens_NL[image_B].to(device) if open_loop else None
        latent_BCSS = latent_NCSS[image_B].to(device)
        return Known(latent_BCSS, where_11SS, known_scales, own_tokens_BL, known_from)

    results = []
    for seed in seeds:
        drawn_ML = run.generate(labels, seed, known_of)
        if particles:
            drawn_ML = most_likely(run, drawn_ML, labels, known_of(slice(0, 1)), particles)
        results.append(run.decode(drawn_ML))
    if paste:
        results = [torch.where(known_HW > 0, images, result) for result in results]
    if not known_HW.all():
        say_completion(results, images, known_HW)
    if judge:
        judge_completions(judges, given.labels, label, results)
    columns = map(to_bytes, (images, shown, *results))
    captions = ["original", "known", *(f"seed {seed}" for seed in seeds)]
    return [Row(name, images, captions) for name, images in zip(given.names, zip(*columns))]


def most_likely(
    run: Run, tokens_ML: Tensor, labels: list[int], known: Known, particles: int
) -> Tensor:
    """Return one of every `particles` rows of tokens: that which best explains what is known.

    What fits an image's known half is p(hole | known), and it cannot be drawn from: a scale's
    tokens are drawn before the finer ones of the known part are looked at. But the model tells how
    likely these are after what was drawn. So many particles each draw what is in the hole from
    p(tokens | coarser ones), and are weighed by what the drawing did not look at, the product of
    p(known token | coarser ones). (Importance sampling would undo guidance and filters in the
    weights, and draw one by them; the heaviest is better than that. It is as good as the best that
    was drawn: the more is known of the coarse maps, the fewer particles will do.)

    Where no class is asked for, particles try the classes in turn, if there are enough of them, and
    the weights tell which the known part is of, too.
    """
    quantizer = run.tokenizer.quantizer
    masks = [known.mask(quantizer, k) for k in range(len(quantizer.scales))]
    known_1L = torch.cat(masks, dim=1).cpu()
    log_weights_ML = run.log_likelihoods(tokens_ML, labels) * known_1L
    log_weights_Nm = log_weights_ML.sum(dim=1).view(-1, particles)
    best_N = log_weights_Nm.argmax(dim=1)
    return tokens_ML.unflatten(0, (-1, particles))[torch.arange(len(best_N)), best_N]


def fill_holes(images: Tensor, known_HW: Tensor) -> Tensor:
    """Grow what is known into the holes: the encoder must not see what was there."""
    known = known_HW[None, None]
    filled = images * known
    while 0 < known.sum() < known.numel():
        near = F.avg_pool2d(known, 3, 1, 1)
        grown = F.avg_pool2d(filled, 3, 1, 1) / near.clamp(min=1e-6)
        filled = torch.where(known > 0, filled, grown)
        known = (near > 0).float()
    return filled


if __name__ == "__main__":
    run_program(main)
