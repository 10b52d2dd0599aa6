"""Train VAR from images to samples:  python train.py

Stage one (`TokenizerStage`) teaches the tokenizer to write images as tokens, and stage two
(`VARStage`) the transformer to predict them. Read `main`; `Stage.run`, their loop; the stages.

A run is a folder. It ends up holding

    tokenizer.pt  var.pt     weights, and what they are of: configuration, classes, preset
    held_out.pt              images that training does not see, for measuring and for sample.py
    train_images.pt          some that it sees: on them sample.py trains classifier.pt, which judges
    tokens.pt                all images as tokens, for the next training in this folder
    train.npy  held_out.npy  a folder's images, decoded once
    decoded.pt               of which files, so that they are not decoded again
    log.jsonl                one line per ten steps, and what was measured on held-out images
    reconstructions.png      held-out images above their reconstructions
    samples.png              generated images, a row per class
    curves.png               losses, PSNR; the transformer's loss and accuracy per scale
"""
from __future__ import annotations

import copy
import gc
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch._functorch.config   # torch alone does not load it
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset, TensorDataset

from sample import DEFAULTS, Run, draw_samples, load_tokenizer
from support.checkpoint import (
    blaming, check_class, check_made_with, content_of, fingerprint, load_checkpoint, load_if_same,
    save_checkpoint,
)
from support.cli import Interrupt, Stopped, UserError, run_program
from support.data import Data, balanced_subset, classifier_images, load_data, read_batches, shuffled
from support.devices import (
    LossScale, Machine, Speed, average_over_processes, choose_machine, copy_from_first,
    gather_over_processes, join_processes, leave_processes, own_part, progress_bar, rank_and_world,
    say, sum_over_processes, wait_for_others,
)
from support.evaluation import psnr, say_health, tokenizer_health
from support.images import Row, at_a_time, rows_of_pairs, to_float
from support.losses import DetailLosses, edge_loss
from support.optim import adamw_and_muon, learning_rate, update_ema
from support.presets import (
    KINDS, Preset, TokenizerPreset, VARPreset, check_begun, check_sizes, chosen_preset,
    training_options, white_level,
)
from support.watching import WatchedLog, say_what_next
from tokenizer import (
    L1_WEIGHT, Decoder, Encoder, PlaceAttention, ResidualBlock, Tokenizer, TokenizerConfig,
)
from var import VAR, Block, VARConfig

MEASURED = 256    # held-out images of each measurement: the mean loss is sure to about 1 %
HEALTH = 500      # held-out images of the tokenizer's health, which are kept in memory


@dataclass(frozen=True)
class Settings:
    """How both stages train."""
    preset: Preset
    machine: Machine
    out: Path                             # the run's folder
    seed: int = 0
    resume: bool = False                  # go on from the checkpoints in the folder
    checkpoint_every: int = 1000          # steps
    grad_accumulation: int = 1            # micro-batches in a step, on each process
    checkpoint_activations: bool = False  # compute layers twice, to keep less in memory
    workers: int = 0                      # threads that read image files
    tensorboard: type | None = None       # what writes its files


def main() -> None:
    options = training_options()
    out = options.out
    machine = choose_machine(options.device, options.precision, options.compile)
    join_processes()
    rank, world = rank_and_world()
    preset = chosen_preset(options)
    channels = options.channels
    if "tokenizer" not in options.stages:
        path = options.tokenizer or out / "tokenizer.pt"
        tokenizer = finished_tokenizer(path, vars(options).get("scales"))
        channels = tokenizer.config.image_channels
        preset = preset.of_tokenizer(
            asdict(tokenizer.config), tokenizer.config.image_side, vars(options))
    check_preset(preset)
    check_sizes(preset, options.stages, world * options.grad_accumulation)
    check_begun(options, preset)
    data = load_data(options.data, preset.image_size, channels, out, options.data_dir,
                     options.seed, options.workers, options.stream, white_level(options))
    settings = Settings(preset, machine, out, options.seed, options.resume,
                        options.checkpoint_every, options.grad_accumulation,
                        options.checkpoint_activations, options.workers, options.tensorboard)
    if "tokenizer" in options.stages:
        tokenizer = TokenizerStage(data, settings, options.perceptual).run()
    elif options.tokenizer and rank == 0:
        keep_copy(tokenizer, path, out / "tokenizer.pt", data)
    if "var" in options.stages:
        gc.collect()   # else stage one may stay on the GPU: its objects refer to each other
        VARStage(tokenizer.to(machine.device), data, settings).run()
    data.keep_classifier_images(out, options.workers)
    say_what_next(out, options.stages)
    leave_processes()


def check_preset(preset: Preset) -> None:
    """Raises UserError for values of which no model can be made."""
    try:
        TokenizerConfig(**preset.tokenizer_shape(image_channels=3))
        VARConfig(**preset.var_shape(classes=1))
    except ValueError as error:
        raise UserError(str(error))


# --------------------------------------------------------------------------------------------------
# The loop that both stages share


class Stage:
    """A training: its loop, its log and its checkpoints. A subclass says what is trained, on what.

    Of the model there is a second, `ema`, a running average of its weights, which blurs out the
    noise of single steps (at decay 0, the tokenizer's, a copy). It is measured, shown and kept.

    name            of the stage: in flags, in the log, in the file's name
    some_unused     whether some steps leave parameters without a gradient
    loss(model, *tensors)    what to minimise for a micro-batch of the data; and a function, called
                    if it is logged, that returns a dictionary of tensors
    validate()      a dictionary to log, of held-out images and the EMA model
    example()       what the model takes, for one image
    picture(few)    what to show of the EMA model; few: fewer images, as training goes on
    """
    name: str
    some_unused = False

    def __init__(self, model: nn.Module, optimizers: list[torch.optim.Optimizer], rows: Dataset,
                 steps: int, batch: int, decay: float, made_with: dict, data: Data,
                 settings: Settings, helpers: nn.Module | None = None):
        """rows: `rows[list of numbers]` are the tensors that `loss` gets. decay: of the EMA, 0 is
        the last weights. made_with: what --resume must find the same in a checkpoint. helpers:
        what `loss` needs beside the model, and nobody once the training is over."""
        self.model = model
        self.ema = copy.deepcopy(model).eval().requires_grad_(False)
        self.optimizers = optimizers
        self.rows = rows
        self.steps = steps
        self.batch = batch
        self.decay = decay
        self.data = data
        self.settings = settings
        self.helpers = nn.Module() if helpers is None else helpers
        self.helper_weights = list(self.helpers.parameters())
        self.peaks = [[group["lr"] for group in each.param_groups] for each in optimizers]
        self.loss_scale = LossScale(settings.machine)
        self.made_with = {**made_with, "seed": settings.seed, "data set": data.digest}
        self.path = settings.out / f"{self.name}.pt"
        self.kind = KINDS[self.name]
        self.step = self.saved_step = 0
        self.speed = Speed(settings.machine, batch, self.ema, self.example())
        wrap_layers(model, settings)   # the EMA model, which takes batches of any size, stays
        self.ddp = model
        if dist.is_initialized():   # then gradients are those of all processes
            self.ddp = DistributedDataParallel(
                model, find_unused_parameters=self.some_unused, gradient_as_bucket_view=True)
            self.ddp.broadcast_buffers = False   # sent once, above; else at every step

    def begin(self) -> None:
        """A hook: first of all, unless a training goes on from a checkpoint."""

    def before_step(self) -> None:
        """A hook: before each step."""

    def after_step(self) -> None:
        """A hook: after the optimizers' steps."""

    def finish(self, log: WatchedLog) -> None:
        """A hook: measures more of the trained model."""

    def run(self) -> nn.Module:
        """Train to the last step, and return the EMA model."""
        settings = self.settings
        preset = settings.preset
        machine = settings.machine
        rank, _ = rank_and_world()
        resuming = settings.resume and self.path.exists()
        finished = resuming and self.resume()
        if rank == 0:   # only now: where `resume` refuses other images, those kept stay
            self.data.keep_held_out(settings.out)
        if finished:
            say(f"{self.path} is finished")
            return self.ema
        if not resuming:
            self.begin()
        log = WatchedLog(self.name, self.step, self.steps, settings)
        order = shuffled(len(self.rows), self.batch, settings.seed, self.step, self.steps)
        batches = read_batches(self.rows, map(own_part, order), settings.workers, machine.device)
        bar = progress_bar(initial=self.step, total=self.steps, desc=self.name, unit="step")
        with Interrupt() as interrupt, bar:
            for tensors in batches:
                # A step's random draws follow from the seed and the step, so a resumed run repeats
                # them. (The codebook changes alike in all processes; each drops its own labels.)
                seed = settings.seed * 1_000_003 + self.step   # apart for 10^6 steps
                torch.manual_seed(seed)
                self.before_step()
                torch.manual_seed(seed + 15_485_863 * rank)

                self.model.train()
                self.model.zero_grad()
                self.helpers.zero_grad()
                loss = torch.zeros((), device=machine.device)
                count = settings.grad_accumulation
                micro_batches = zip(*(x.chunk(count) for x in tensors))
                for i, micro_batch in enumerate(micro_batches):
                    to_log = None   # else the last logits would be kept
                    exchange = i + 1 == count or self.ddp is self.model
                    with nullcontext() if exchange else self.ddp.no_sync():
                        with machine.autocast():
                            micro_loss, to_log = self.loss(self.ddp, *micro_batch)
                        self.loss_scale.scale(micro_loss / count).backward()
                    loss += micro_loss.detach() / count
                for weight in self.helper_weights:
                    if weight.grad is not None:
                        average_over_processes(weight.grad)

                self.loss_scale.unscale(self.optimizers)
                norm = clip_grad_norm_(self.model.parameters(), 1.0)
                if self.helper_weights:
                    norm = norm + clip_grad_norm_(self.helper_weights, 1.0)
                left_out = self.loss_scale.overflowed(norm)
                if left_out:   # then neither need be a number
                    loss, norm = torch.zeros(2, device=machine.device)
                rate = learning_rate(self.step, self.steps, preset.warmup, preset.final_lr)
                for optimizer, peaks in zip(self.optimizers, self.peaks):
                    for group, peak in zip(optimizer.param_groups, peaks):
                        group["lr"] = rate * peak
                    if not left_out:
                        optimizer.step()
                torch.manual_seed(seed)
                self.after_step()
                # The first step replaces the random start.
                update_ema(self.ema, self.model, self.decay if self.step else 0.0)
                tenth = self.step % 10 == 0
                logged = to_log() if tenth and not left_out else {}
                self.step += 1
                bar.update()

                # Reading a number waits for the GPU: every tenth step, and before what follows.
                last = self.step == self.steps
                measured = last or self.step % math.ceil(self.steps / 8) == 0   # up to eight times
                saved = last or self.step % settings.checkpoint_every == 0
                if not (tenth or measured or saved):
                    continue
                asked = torch.full_like(loss, interrupt.asked)
                numbers = average_over_processes(torch.stack([loss, norm, asked]))
                mean_loss, mean_norm, stop = numbers.tolist()
                self.check(mean_loss, mean_norm)
                if rank == 0 and not left_out:
                    speed = self.speed.text(bar)
                    bar.set_postfix_str(f"loss {mean_loss:.4f}, {speed}", refresh=False)
                if logged:
                    values = {name: value.tolist() for name, value in logged.items()}
                    log.write(self.step, "train", loss=mean_loss, **values)
                if measured:
                    log.write(self.step, "held_out", **self.validate())
                if saved or stop:   # the last step, too: should a picture fail, no step is lost
                    self.save(finished=False)
                if stop or measured and not last:
                    log.show(self.picture, self.step, stopped=bool(stop))
                if stop:
                    break
            asked = torch.tensor(float(interrupt.asked), device=machine.device)
            if average_over_processes(asked) > 0:   # by now, or while the last step was saved
                raise Stopped(f"stopped after step {self.step} of {self.steps} and saved to "
                              f"{settings.out}; the same command with --resume goes on")
        if rank == 0:
            self.finish(log)
            log.draw(self.picture(few=False), self.step)
        self.save(finished=True)
        return self.ema

    def check(self, loss: float, norm: float) -> None:
        """Raises UserError for what is no number; nothing is saved after it."""
        largest = get_total_norm(self.ema.parameters(), math.inf).item()
        if all(map(math.isfinite, (loss, norm, largest))):
            return
        kept = (f"the last good checkpoint, of step {self.saved_step}, is {self.path}"
                if self.saved_step else "there is no checkpoint yet")
        also = " or --precision fp32" if self.loss_scale.is_enabled() else ""
        raise UserError(f"at step {self.step} the {self.name} loss became {loss}, its gradient "
                        f"{norm} and its largest weight {largest}; {kept}; try a lower "
                        f"--{self.name}-lr{also}")

    def save(self, finished: bool) -> None:
        """Write the EMA model and, before the end, what --resume needs."""
        self.saved_step = self.step
        if rank_and_world()[0] == 0:
            content = {
                **content_of(self.ema),
                "classes": self.data.classes, "white": self.data.white,
                "made_with": self.made_with,
                "preset": asdict(self.settings.preset),
            }
            if not finished:
                content["training"] = {
                    "step": self.step,
                    "model": self.model.state_dict(),
                    "helpers": self.helpers.state_dict(),
                    "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                    "loss_scale": self.loss_scale.state_dict(),
                }
            save_checkpoint(self.path, self.kind, **content)
        wait_for_others()   # torchrun kills the others once a process has ended

    def resume(self) -> bool:
        """Take over what `save` wrote; returns whether that was a finished training."""
        content = load_checkpoint(self.path, self.kind)
        with blaming(self.path):
            check_class(self.path, content, type(self.model))
            check_made_with(self.path, content, self.made_with)
            self.ema.load_state_dict(content["model"])
            if "training" not in content:
                return True
            training = content["training"]
            self.model.load_state_dict(training["model"])
            self.helpers.load_state_dict(training["helpers"])
            for optimizer, state in zip(self.optimizers, training["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            self.loss_scale.load_state_dict(training["loss_scale"])
            self.step = self.saved_step = training["step"]
        return False


def wrap_layers(model: nn.Module, settings: Settings) -> None:
    """Do to a model, but not its quantizer, what --checkpoint-activations and --compile ask."""
    for module in model.modules():
        if settings.checkpoint_activations:
            if isinstance(module, (ResidualBlock, PlaceAttention, Block)):
                module.forward = partial(checkpoint, module.forward, use_reentrant=False)
        if settings.machine.compile and isinstance(module, (Encoder, Decoder, VAR)):
            # `balance` (support/losses.py) goes back through the decoder before the step does.
            torch._functorch.config.donated_buffer = False
            module.compile(dynamic=False)   # every batch of a training has the same shape


# --------------------------------------------------------------------------------------------------
# Stage one: the tokenizer


class TokenizerStage(Stage):
    """Minimises errors of pixels, edges and smaller images, and the codebook loss.

    At first encoder and decoder train alone; then codes are taken from real residuals. Presets for
    larger images add a perceptual distance, and later a discriminator (support/losses.py)."""
    name = "tokenizer"
    some_unused = True   # no codes at first

    def __init__(self, data: Data, settings: Settings, lpips_weights: Path | None = None):
        preset = settings.preset
        machine = settings.machine
        self.quantized_from = int(preset.unquantized * preset.tokenizer_steps)
        self.adversarial_from = int(preset.adversarial_from * preset.tokenizer_steps)
        rows = balanced_subset(data.held_out, HEALTH)
        self.unseen = to_float(data.held_out.tensors[0][rows])
        torch.manual_seed(settings.seed)
        config = TokenizerConfig(**preset.tokenizer_shape(data.channels))
        model = Tokenizer(config).to(machine.device)
        detail = DetailLosses(preset, data.channels, len(data.classes), lpips_weights)
        detail.to(machine.device)
        layers = nn.ModuleList([model.encoder, model.decoder])
        optimizers = adamw_and_muon(
            model, layers, preset.tokenizer_lr, 0.0, preset.muon, machine.dtype)
        made_with = {**preset.of(TokenizerPreset), "LPIPS": bool(lpips_weights)}
        self.counts_V = torch.zeros_like(model.quantizer.hits_V, dtype=torch.int64)
        super().__init__(
            model, optimizers + detail.optimizers(), data.train, preset.tokenizer_steps,
            preset.tokenizer_batch, 0.0, made_with, data, settings, detail)

    def begin(self) -> None:
        if hasattr(self.helpers, "classifier"):
            say("perceptual distance: by the features of a classifier, trained now on these images")
            self.helpers.learn(*classifier_images(self.data, self.settings.workers))

    @torch.no_grad()
    def before_step(self) -> None:
        if self.step != self.quantized_from:
            return
        # At 1x1 V / K codes are drawn from 512 residuals. (`ema` is the model, not compiled.)
        (ids,) = shuffled(len(self.rows), min(512, len(self.rows)), self.settings.seed, 0, 1)
        latents = []
        for some in torch.tensor(ids).split(at_a_time(self.settings.preset.image_size)):
            images, _ = self.rows[some.tolist()]
            with self.settings.machine.autocast():
                latents.append(self.ema.latent(to_float(images.to(self.settings.machine.device))))
        self.model.quantizer.start_from(torch.cat(latents))
        copy_from_first(self.model.quantizer.codebook_VC.data)   # each GPU may round otherwise

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Callable]:
        """Return |x - y|^2, the weighted errors beside it and L_vq, as a sum; and all, to log."""
        quantize = self.step >= self.quantized_from
        originals = to_float(images.to(self.settings.machine.device, non_blocking=True))
        preset = self.settings.preset
        sides = range(2, self.model.config.scales[-1])
        small_s = sides[self.step % len(sides)] if preset.smaller_weight and sides else None
        reconstructions, losses = model(originals, quantize, small_s)
        if quantize:
            self.counts_V += self.model.quantizer.count(self.model.quantizer.last_tokens_BL)
        losses["edges"] = edge_loss(originals, reconstructions)
        loss = losses["mse"] + L1_WEIGHT * losses["l1"] + preset.edge_weight * losses["edges"]
        loss = loss + preset.smaller_weight * losses.get("smaller", 0.0)
        loss, for_detail = self.helpers(   # see DetailLosses
            originals, reconstructions, loss, self.model.decoder.conv_out.weight,
            adversarial=self.step >= self.adversarial_from, scale=self.loss_scale.factor())
        return loss + losses["codebook"], lambda: losses | for_detail

    @torch.no_grad()
    def after_step(self) -> None:
        """Take the hits into their EMA; every twentieth step, up to 90 %, move dead codes."""
        if self.step < self.quantized_from:
            return
        quantizer = self.model.quantizer
        quantizer.update_hits(sum_over_processes(self.counts_V))
        self.counts_V.zero_()
        ending = self.step >= 0.9 * self.steps
        if self.quantized_from < self.step and self.step % 20 == 0 and not ending:
            residuals = [gather_over_processes(x_BlC) for x_BlC in quantizer.last_residuals]
            quantizer.revive(residuals, self.optimizers[0])

    def held_out_batches(self, count: int) -> Iterator[Tensor]:
        """Yield `count` held-out images, or all, on the device: as many at once as a pass takes."""
        for images in self.unseen[:count].split(at_a_time(self.settings.preset.image_size)):
            yield images.to(self.settings.machine.device)

    @torch.no_grad()
    def validate(self) -> dict:
        count = len(self.unseen[:MEASURED])
        means = Counter()
        for originals in self.held_out_batches(count):
            with self.settings.machine.autocast():
                reconstructions, losses = self.ema(originals)
                losses |= self.helpers.held_out(originals, reconstructions)
            losses["clamped"] = F.mse_loss(reconstructions.clamp(-1, 1), originals)
            share = len(originals) / count
            means.update({name: share * loss.item() for name, loss in losses.items()})
        means["psnr"] = psnr(means.pop("clamped"))
        return means

    def example(self) -> tuple[Tensor, ...]:
        return (self.unseen[:1].to(self.settings.machine.device),)

    def finish(self, log: WatchedLog) -> None:
        with self.settings.machine.autocast():
            health = tokenizer_health(self.ema, self.held_out_batches(HEALTH))
        log.write(self.steps, "health", **health)
        say_health(health, self.ema.config)

    @torch.no_grad()
    def picture(self, few: bool) -> list[Row]:
        images = self.unseen[:16 if few else 32]
        with self.settings.machine.autocast():
            results = [self.ema(some)[0].cpu() for some in self.held_out_batches(len(images))]
        return rows_of_pairs(images, torch.cat(results))


def finished_tokenizer(path: Path, scales: tuple[int, ...] | None) -> Tokenizer:
    """Load a trained tokenizer of ours or a published one, whose file does not tell its scales."""
    if path.suffix == ".pt" and "training" in load_checkpoint(path, "tokenizer"):
        raise UserError(f"{path} is not trained to its end; --stage tokenizer --resume, in its "
                        f"folder, goes on with it")
    return load_tokenizer(path, scales)


def keep_copy(tokenizer: Tokenizer, source: Path, own: Path, data: Data) -> None:
    """A run is complete: it holds the tokenizer that its transformer is trained on."""
    if not own.exists():
        save_checkpoint(own, "tokenizer", **content_of(tokenizer), classes=data.classes,
                        white=data.white, made_with={"copied from": str(source)})
    elif fingerprint(load_tokenizer(own)) != fingerprint(tokenizer):
        raise UserError(f"{own} is another tokenizer than {source}; choose another --out")


# --------------------------------------------------------------------------------------------------
# Stage two: the transformer


class VARStage(Stage):
    """Minimises the cross entropy between logits and tokens, all scales at once."""
    name = "var"

    def __init__(self, tokenizer: Tokenizer, data: Data, settings: Settings):
        preset = settings.preset
        self.tokenizer = tokenizer
        tokens, self.held_out_rows = tokens_of(tokenizer, data, settings)
        torch.manual_seed(settings.seed)
        model = VAR(VARConfig(**preset.var_shape(len(data.classes)))).to(settings.machine.device)
        made_with = {**preset.of(VARPreset), "tokenizer": fingerprint(tokenizer)}
        super().__init__(
            model, var_optimizers(model, preset, settings.machine.dtype), tokens,
            preset.var_steps, preset.var_batch, preset.ema, made_with, data, settings)

    def loss(self, model: nn.Module, tokens_BL: Tensor, labels_B: Tensor
             ) -> tuple[Tensor, Callable]:
        """Return nats per token; and, to log, the accuracy and the means of both for each scale."""
        device = self.settings.machine.device
        tokens_BL = tokens_BL.to(device, non_blocking=True).long()
        labels_B = labels_B.to(device, non_blocking=True)
        inputs = self.tokenizer.teacher_inputs(tokens_BL)                      # [B, L-1, C]
        logits_BLV = model(labels_B, inputs).float()                           # [B, L, V]
        # Rows of V numbers side by side: for [B, V, L] they would be copied first.
        loss_N = F.cross_entropy(logits_BLV.flatten(0, 1), tokens_BL.flatten(), reduction="none")
        loss_BL = loss_N.view_as(tokens_BL)

        def to_log() -> dict[str, Tensor]:
            hit_BL = (logits_BLV.argmax(dim=-1) == tokens_BL).float()
            return {
                "accuracy": hit_BL.mean(),
                "loss_per_scale": self.per_scale(loss_BL.detach()),
                "accuracy_per_scale": self.per_scale(hit_BL),
            }
        return loss_BL.mean(), to_log

    def per_scale(self, values_BL: Tensor) -> Tensor:
        return torch.stack([values_BL[:, span].mean() for span in self.model.config.spans])

    @torch.no_grad()
    def validate(self) -> dict:
        some = self.held_out_rows[balanced_subset(self.held_out_rows, MEASURED)]
        means = Counter()
        _, world = rank_and_world()
        size = self.batch // world // self.settings.grad_accumulation   # as trained
        for micro_batch in zip(*(x.split(size) for x in some)):
            with self.settings.machine.autocast():
                loss, to_log = self.loss(self.ema, *micro_batch)
            share = len(micro_batch[0]) / len(some[0])
            numbers = {"loss": loss, **to_log()}
            means.update({name: share * number for name, number in numbers.items()})
        return {name: value.tolist() for name, value in means.items()}

    def example(self) -> tuple[Tensor, ...]:
        device = self.settings.machine.device
        tokens_1L, label_1 = self.held_out_rows[[0]]
        return label_1.to(device), self.tokenizer.teacher_inputs(tokens_1L.to(device).long())

    def picture(self, few: bool) -> list[Row]:
        settings = self.settings
        run = Run(settings.out, self.tokenizer, self.ema, self.data.classes, self.data.held_out,
                  settings.machine, replace(DEFAULTS, **settings.preset.drawing()))
        return draw_samples(run, None, 4 if few else 10, settings.seed)


def var_optimizers(model: VAR, preset: Preset, dtype: torch.dtype) -> list[torch.optim.Optimizer]:
    """Give the layers to Muon; modulations, embeddings and the head are AdamW's in any case."""
    layers = nn.ModuleList(part for block in model.blocks for part in (block.attention, block.mlp))
    return adamw_and_muon(model, layers, preset.var_lr, preset.weight_decay, preset.muon, dtype)


def tokens_of(tokenizer: Tokenizer, data: Data, settings: Settings
              ) -> tuple[TensorDataset, TensorDataset]:
    """Return tokens [N, L] and labels [N] of the training and the held-out images, computed once
    and kept in the run's folder."""
    path = settings.out / "tokens.pt"
    begun = settings.out / "var.pt"
    made_with = {"tokenizer": fingerprint(tokenizer), "data set": data.digest}
    if settings.resume and begun.exists():   # with the tokens it began with, in whatever dtype
        with blaming(begun):
            content = load_checkpoint(begun, KINDS["var"])
            check_made_with(begun, content, made_with)
    else:
        made_with["dtype"] = str(settings.machine.dtype)
    content = load_if_same(path, "set of tokens", made_with)
    if content:
        return TensorDataset(*content["train"]), TensorDataset(*content["held_out"])
    train = tokenise(tokenizer, data.train, settings, "tokenise train")
    held_out = tokenise(tokenizer, data.held_out, settings, "tokenise held_out")
    if rank_and_world()[0] == 0:
        save_checkpoint(path, "set of tokens", made_with=made_with, train=train, held_out=held_out)
    return TensorDataset(*train), TensorDataset(*held_out)


@torch.no_grad()
def tokenise(tokenizer: Tokenizer, images: Dataset, settings: Settings, what: str
             ) -> tuple[Tensor, Tensor]:
    """Return tokens and labels of images, of which each process encodes its share."""
    config = tokenizer.config
    machine = settings.machine
    small = torch.int16 if config.vocabulary <= 2**15 else torch.int32
    own = own_part(range(len(images)))
    size = min(128, at_a_time(config.image_side))
    batches = [list(own[begin:begin + size]) for begin in range(0, len(own), size)]
    tokens = [torch.empty(0, sum(s * s for s in config.scales), dtype=small)]
    labels = [torch.empty(0, dtype=torch.int64)]
    loaded = read_batches(images, batches, settings.workers, machine.device)
    bar = progress_bar(loaded, desc=what, total=len(batches), unit="batch")
    for pixels, labels_B in bar:
        images_B = to_float(pixels.to(machine.device))
        tokens_BL = tokenizer.encode(images_B)
        tokens.append(tokens_BL.to(small).cpu())
        labels.append(labels_B)
    shares = [(torch.cat(tokens), torch.cat(labels))]
    if dist.is_initialized():
        shares *= dist.get_world_size()
        dist.all_gather_object(shares, shares[0])
    return tuple(map(torch.cat, zip(*shares)))


if __name__ == "__main__":
    run_program(main)
