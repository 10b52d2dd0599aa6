"""Train VAR from images to samples:  python train.py

Stage one (`TokenizerStage`) teaches the tokenizer to write images as tokens; stage two (`VARStage`)
writes every image as tokens once, and teaches the transformer to predict them. Both go through the
same loop, `Stage.loop`. Read `train`, then `Stage`, then the two stages: that is how VAR is trained.
Below is what they need: tokens, data sets, several processes, presets and flags.

A run is a folder. It ends up holding

    tokenizer.pt  var.pt     weights, and what they are of: configuration, data, classes
    held_out.pt              images that training does not see, for measuring and for sample.py
    train_images.pt          some that it sees, for the classifier by which sample.py judges
    tokens.pt                all images as tokens, for the next training in this folder
    train-*.images           a folder's images, decoded once; held_out-*.images, too
    log.jsonl                one line per few steps, and what was measured on held-out images
    reconstructions.png      held-out images above their reconstructions
    samples.png              generated images, a row per class
    curves.png               both losses; the transformer's loss and accuracy per scale
"""
from __future__ import annotations

import argparse
import atexit
import contextlib
import copy
import gzip
import hashlib
import io
import math
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, TensorDataset
from tqdm import tqdm

from kernels import forward_flops, peak_flops
from sample import (
    CLASSIFIER_IMAGES, COUNT, FILTERS, IMAGE_ENDINGS, SEED, Interrupt, Log, Parser, Run,
    Stopped, UserError, at_a_time, blaming, check_compiler, draw_curves, draw_samples,
    grid_of_pairs, in_short, join_processes, load_checkpoint, load_tokenizer,
    mean_over_processes, number, own_part, rank_and_ranks, read_image, read_log, run_program,
    save_checkpoint, save_picture, say, settle_device, to_float, train_classifier,
)
from tokenizer import (
    PUBLISHED_SCALES, Classifier, Decoder, Discriminator, Encoder, PixelAttention, ResidualBlock,
    Tokenizer, TokenizerConfig, average_over_processes, averaged_down, balance,
    perceptual_distance, psnr,
)
from var import VAR, Block, VARConfig, adamw_and_muon

try:
    import fcntl
except ImportError:   # on Windows
    fcntl = None


def main() -> None:
    options = parse()
    settle(options)
    with alone_in(options.out) as options.lock:
        train(options)
    if dist.is_initialized():
        dist.destroy_process_group()


def train(options: argparse.Namespace) -> None:
    """What --stage asks for, and what a run keeps beside the two models."""
    data = load_data(options)
    if "tokenizer" in options.stages:
        first = TokenizerStage(data, options)
    else:
        tokenizer = chosen_tokenizer(data, options)
    if options.overwrite and rank_and_ranks()[0] == 0:   # now that nothing is left to refuse
        forget_old_training(data, options)
    if "tokenizer" in options.stages:
        tokenizer = first.run()
        del first   # a GPU has its memory for the second
    if "var" in options.stages:
        VARStage(tokenizer, data, options).run()
    if rank_and_ranks()[0] == 0:
        curves = draw_curves(read_log(options.out / "log.jsonl"), tokenizer.config.scales)
        save_picture(options.out / "curves.png", curves)
        images, labels = some_images(data, options)
        save_checkpoint(options.out / "train_images.pt", "set of training images", images=images,
                        labels=labels, side=options.preset.image_size, data_set=data.key)


def forget_old_training(data: Data, options: argparse.Namespace) -> None:
    """The checkpoints of all stages at once, as --resume must not find a part of it; and what was
    decoded of another folder."""
    for name in (*options.stages, "train_images"):
        (options.out / f"{name}.pt").unlink(missing_ok=True)
    for path in options.out.glob(f"*-{16 * '[0-9a-f]'}.images"):
        if path.stem.rpartition("-")[2] not in data.key:
            path.unlink()


# --------------------------------------------------------------------------------------------------
# The loop that both stages share


class Stage:
    """A training: the loop, its log and its checkpoints. A subclass says what is trained, on what.

    There are two of the model: `model` is trained, and `average`, of its weights, is what is
    measured, shown and kept.

    name      of the stage: in flags, in the log, in the file's name
    kind      what its checkpoint is called
    spares    whether some steps leave parameters without a gradient, for which several processes
              have to look out

    loss(*tensors)         what to minimise for these rows of the data, and what to log: a function,
                           called if it is logged, that returns a dictionary of tensors
    validate(model)        a dictionary to log of held-out images
    example()              what the model takes, for one image; __init__ already asks for it
    finish(model, log)     what the run shows of the trained model
    """
    name: str
    kind: str
    spares = False

    def __init__(
        self, model: nn.Module, optimizers: list[torch.optim.Optimizer], rows: Dataset, steps: int,
        batch: int, ema: float, recipe: dict, data: Data, options: argparse.Namespace,
        helpers: dict[str, nn.Module] | None = None,
    ):
        """rows: what `loss` gets its tensors from. recipe: what of the flags shapes the training.

        helpers: what `loss` needs beside the model, and nobody once the training is over. They are
        part of a checkpoint; those that have gradients are trained, by one of the optimizers.

        ema: what is kept in the end is not the last weights but a running average of them, which
        blurs out the noise of single steps: average = ema average + (1 - ema) weights. 0: the last.
        """
        self.model = model
        self.optimizers = optimizers
        self.rows = rows
        self.steps = steps
        self.batch = batch
        self.ema = ema
        self.data = data
        self.options = options
        self.average = copy.deepcopy(model).eval().requires_grad_(False)
        change_parts(model, options)   # compiled, say; the average takes batches of any size
        self.replica = model   # the model, its gradients averaged over the processes
        if dist.is_initialized():
            self.replica = nn.parallel.DistributedDataParallel(
                model, find_unused_parameters=self.spares, gradient_as_bucket_view=True)
        self.helpers = nn.ModuleDict(helpers or {})
        self.peaks = [[group["lr"] for group in each.param_groups] for each in optimizers]
        self.peak_flops = peak_flops(options.device) if options.precision == "bf16" else None
        if self.peak_flops:
            self.flops = forward_flops(self.average, *self.example())
        # What a training that goes on must have in common with its checkpoint:
        self.identity = {**asdict(model.config), **recipe}
        self.identity |= {"seed": options.seed, "data set": data.key}
        self.path = options.out / f"{self.name}.pt"
        self.step = 0
        self.saved = 0
        self.parts = options.grad_accumulation or self.parts_that_fit()

    def begin(self) -> None:
        """What a training that does not go on from a checkpoint does first."""

    def before_step(self) -> None:
        """What changes the model before a step."""

    def after_step(self) -> None:
        """What else changes the model, once the optimizers have."""

    def run(self) -> nn.Module:
        """Train to the last step, from the checkpoint if asked to; returns the average."""
        options = self.options
        begun = options.resume and self.path.exists()
        if begun and self.resume():
            say(f"{self.path} is finished")
            return self.average
        if rank_and_ranks()[0] == 0:
            images, labels = self.data.held_out.tensors
            save_checkpoint(options.out / "held_out.pt", "set of held-out images",
                            images=images, labels=labels)
        if not begun:
            self.begin()
        log = Log(options.out / "log.jsonl", self.name, self.step)
        if self.loop(log):
            how = "--resume instead of --overwrite" if options.overwrite else "--resume"
            raise Stopped(f"stopped after step {self.step} of {self.steps} and saved to "
                          f"{options.out}; the same command with {how} goes on from there")
        if rank_and_ranks()[0] == 0:
            self.finish(self.average, log)
        self.save(finished=True)
        return self.average

    def loop(self, log: Log) -> bool:
        """To the last step, or until any process is asked to stop; returns whether one was. Either
        way the last step is saved."""
        options = self.options
        steps = shuffled(len(self.rows), self.batch, options.seed, self.step, self.steps)
        bar = tqdm(initial=self.step, total=self.steps, desc=self.name, unit="step",
                   mininterval=0.5, disable=rank_and_ranks()[0] > 0)
        newest = None
        with Interrupt() as interrupt, bar:
            for tensors in read_ahead(self.rows, map(own_part, steps), options):
                before = newest
                newest = self.advance(tensors, interrupt.asked)
                last = self.step == self.steps
                measured = last or self.step % max(1, self.steps // 8) == 0
                saved = last or self.step % options.checkpoint_every == 0
                # A report is read when the next step is on its way, so that nobody waits for a GPU;
                # the newest, too, before anything is measured or saved.
                stop = before is not None and self.read(before, log, bar)
                if stop or measured or saved:
                    stop = self.read(newest, log, bar) or stop
                    newest = None
                    self.check_weights()
                if measured:
                    log.write(self.step, "held_out", **self.validate(self.average))
                if stop or saved:   # at the last step, too: should a picture fail, no step is lost
                    self.save(finished=False)
                if stop:
                    return True
            (asked,) = mean_over_processes(interrupt.asked, device=options.device).tolist()
        return asked > 0   # during the last step

    def advance(self, tensors: list[Tensor], asked: bool) -> Report:
        """One step. asked: whether this process was asked to stop."""
        # Every random draw of a step follows from the seed and the step: a resumed run repeats them
        # exactly. All processes draw the same codes, so that codebooks stay alike, but each its own
        # labels to drop.
        seed = self.options.seed * 1_000_003 + self.step
        torch.manual_seed(seed)
        self.before_step()
        torch.manual_seed(seed + 15_485_863 * rank_and_ranks()[0])   # a prime, far from any step
        self.model.train()
        loss, to_log = self.gradients(tensors)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if len(self.helpers):
            norm = norm + nn.utils.clip_grad_norm_(self.helpers.parameters(), 1.0)
        preset = self.options.preset
        rate = learning_rate(self.step, self.steps, preset.warmup, preset.final_lr)
        for optimizer, peaks in zip(self.optimizers, self.peaks):
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = peak * rate
            optimizer.step()
        torch.manual_seed(seed)
        self.after_step()
        self.update_average()
        logged = to_log() if self.step % 10 == 0 else {}
        self.step += 1
        numbers = mean_over_processes(loss, norm, asked, device=self.options.device)
        return Report(self.step, read_later(numbers), logged)

    def gradients(self, tensors: list[Tensor]) -> tuple[Tensor, Callable[[], dict[str, Tensor]]]:
        """The gradients of this process's rows, computed in parts; their mean loss, and what the
        last part logs."""
        self.model.zero_grad()
        self.helpers.zero_grad()
        parts = self.parts
        total = torch.zeros((), device=self.options.device)
        for i, part in enumerate(zip(*(tensor.chunk(parts) for tensor in tensors))):
            alone = contextlib.nullcontext()
            if self.replica is not self.model and i + 1 < parts:
                alone = self.replica.no_sync()   # the processes exchange gradients once, at the end
            with alone:
                with self.options.autocast():
                    loss, to_log = self.loss(*part)
                (loss / parts).backward()
            total += loss.detach() / parts
        for parameter in self.helpers.parameters():
            if parameter.grad is not None:
                average_over_processes(parameter.grad)
        return total, to_log

    def parts_that_fit(self) -> int:
        """In how many parts a GPU has the memory for a step's images; 1 on anything else."""
        device = self.options.device
        if device.type != "cuda":
            return 1
        torch.cuda.empty_cache()   # what an earlier stage had is free
        free, _ = torch.cuda.mem_get_info(device)
        weights = sum(weight.numel() for weight in self.model.parameters())
        free -= 16 * weights   # gradients, two moments, and what an optimizer computes with
        images = self.batch // rank_and_ranks()[1]
        parts = parts_for(images, self.bytes_for_backward(), free)
        if parts > 1:
            say(f"{self.name}: {images} images a step are computed in {parts} parts, for memory")
        return parts

    def bytes_for_backward(self) -> int:
        """What the forward pass of one image more keeps for the backward pass."""
        kept = []
        for images in (1, 2):
            found = {}

            def keep(tensor: Tensor) -> Tensor:
                found[tensor.data_ptr()] = tensor.nbytes
                return tensor

            inputs = [torch.cat(images * [x]) for x in self.example()]
            with self.options.autocast():
                with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                    self.model.eval()(*inputs)
            kept.append(sum(found.values()))
        return kept[1] - kept[0]

    @torch.no_grad()
    def update_average(self) -> None:
        share = 1 - self.ema if self.step else 1.0   # the initial weights are no part of it
        averages = self.average.state_dict()
        for name, value in self.model.state_dict().items():
            averages[name].lerp_(value, share)

    def read(self, report: Report, log: Log, bar: tqdm) -> bool:
        """Show and log a step's report; returns whether any process was asked to stop.

        Raises UserError for a loss or a gradient that is no number. Nothing is saved after it.
        """
        loss, norm, stop = report.numbers()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise UserError(f"the {self.name} loss became {loss} and its gradient {norm} at step "
                            f"{report.step - 1}; {self.last_good()}; try a lower --{self.name}-lr")
        rate = bar.format_dict["rate"]
        bar.set_postfix_str(f"loss {loss:.4f}{self.speed(rate)}", refresh=False)
        bar.update()
        if not bar.disable and bar.n == bar.initial + 20:
            seconds = bar.format_dict["elapsed"] / 20 * (self.steps - bar.n)
            say(f"{self.name}: about {seconds / 60:.1f} minutes on this machine")
        if report.logged:
            values = {name: value.tolist() for name, value in report.logged.items()}
            log.write(report.step, "train", loss=loss, **values)
        return stop > 0

    def check_weights(self) -> None:
        """Raises UserError for weights that are no numbers: a finite gradient can end in them."""
        for weight in self.average.parameters():
            if not weight.isfinite().all():
                raise UserError(f"the {self.name} has weights that are no numbers at step "
                                f"{self.step}; {self.last_good()}; try a lower --{self.name}-lr")

    def last_good(self) -> str:
        if not self.saved:
            return "there is no checkpoint yet"
        return f"the last good checkpoint, of step {self.saved}, is {self.path}"

    def speed(self, rate: float | None) -> str:
        """What so many steps per second come to, over all processes."""
        if not rate:
            return ""
        images = rate * self.batch
        tokens = images * sum(s * s for s in self.model.config.scales)
        text = f", {images:.0f} images/s, {tokens:.0f} tokens/s"
        if not self.peak_flops:
            return text
        used = 3 * self.flops * images   # the backward pass is twice the forward
        return f"{text}, {used / (self.peak_flops * rank_and_ranks()[1]):.0%} of peak FLOP/s"

    def save(self, finished: bool) -> None:
        """Keep the average; until the end, what going on takes, too."""
        self.saved = self.step
        if rank_and_ranks()[0] == 0:
            content = {
                "config": asdict(self.model.config),
                "model": self.average.state_dict(),
                "classes": self.data.classes,
                "identity": self.identity,
            }
            if not finished:
                content["training"] = {
                    "step": self.step,
                    "model": self.model.state_dict(),
                    "helpers": self.helpers.state_dict(),
                    "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                }
            save_checkpoint(self.path, self.kind, **content)
        if dist.is_initialized():   # torchrun kills the others once a process has ended
            dist.barrier()

    def resume(self) -> bool:
        """Take over what `save` wrote; returns whether that was a finished training."""
        content = load_checkpoint(self.path, self.kind)
        if "copied_from" in content:
            raise UserError(f"{self.path} is a copy of {content['copied_from']}: "
                            f"--stage var goes on without training one")
        with blaming(self.path):
            self.compare(content["identity"])
            self.average.load_state_dict(content["model"])
            if "training" not in content:
                return True
            training = content["training"]
            self.model.load_state_dict(training["model"])
            self.helpers.load_state_dict(training["helpers"])
            for optimizer, state in zip(self.optimizers, training["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            self.step = training["step"]
        self.saved = self.step
        return False

    def compare(self, begun: dict) -> None:
        """Raises UserError for a checkpoint of another training; another rate is only said."""
        for name, now in self.identity.items():
            before = begun.get(name)   # None, where an older checkpoint knows nothing of it
            if before == now:
                continue
            values = f": {before}, not {now}" if len(str(now)) < 64 else ""   # or a digest
            text = f"{self.path} was begun with another {name}{values}"
            if not name.endswith("_lr"):
                raise UserError(f"{text}; it does not go on")
            say(text)


@dataclass
class Report:
    """Of a step: its loss, the norm of its gradient, whether to stop; and what is logged of it."""
    step: int
    numbers: Callable[[], list[float]]
    logged: dict[str, Tensor]


def read_later(values: Tensor) -> Callable[[], list[float]]:
    """values.tolist() for later: a GPU copies them when it has them, and is not waited for now."""
    if values.device.type != "cuda":
        return values.tolist
    copied = values.to("cpu", non_blocking=True)
    there = torch.cuda.Event()
    there.record()

    def read() -> list[float]:
        there.synchronize()
        return copied.tolist()
    return read


def parts_for(images: int, bytes_each: int, free: int) -> int:
    """The least number of equal parts of which each fits; half as much more is for the losses, and
    for results that pass."""
    for parts in range(1, images):
        if images % parts == 0 and images // parts * bytes_each * 1.5 <= free:
            return parts
    return images


def learning_rate(step: int, steps: int, warmup: int, final: float) -> float:
    """Linear warm-up, then linearly down to the final share; as a share of the peak."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return final + (1 - final) * (1 - progress)


def shuffled(count: int, batch: int, seed: int, begin: int, end: int) -> Iterator[list[int]]:
    """The rows of training steps begin .. end-1: each pass over the data in a new order, fixed by
    the seed."""
    epoch = -1
    for step in range(begin, end):
        rows = []
        for place in range(step * batch, (step + 1) * batch):
            if place // count != epoch:
                epoch = place // count
                generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
                order = torch.randperm(count, generator=generator)
            rows.append(int(order[place % count]))
        yield rows


def read_ahead(data: Dataset, rows: Iterable[list[int]], options: argparse.Namespace) -> DataLoader:
    """The tensors of each list of rows. Image files are read by --workers processes meanwhile."""
    return DataLoader(
        data, batch_size=None, sampler=rows,
        num_workers=options.workers if isinstance(data, FolderImages) else 0,
        pin_memory=options.device.type == "cuda",
        generator=torch.Generator(),   # so the loader leaves the run's random state alone
        worker_init_fn=partial(only_read, options.lock),
    )


def only_read(lock: int | None, _: int) -> None:
    """In a process that reads images: Ctrl-C and SIGTERM, which all processes of a program may get,
    are for the one that trains. It ends the others when it has saved. Should it be killed, the
    folder is free at once, and not when the others notice."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if lock is not None:
        os.close(lock)


@atexit.register
def end_readers() -> None:
    """At the program's end, by whatever error: Python sends them SIGTERM, and waits for ever."""
    for process in multiprocessing.active_children():
        process.kill()


def change_parts(model: nn.Module, options: argparse.Namespace) -> None:
    """What --checkpoint-activations and --compile do to a model. The quantizer's many small steps
    stay as they are."""
    layers = (ResidualBlock, PixelAttention, Block)
    for module in model.modules():
        if options.checkpoint_activations and isinstance(module, layers):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)
        if options.compile and isinstance(module, (Encoder, Decoder, VAR)):
            module.compile(dynamic=False)   # every batch of a training has the same shape


# --------------------------------------------------------------------------------------------------
# Stage one: the tokenizer


class TokenizerStage(Stage):
    """At first encoder and decoder train alone; then codes are taken from real residuals; and in
    presets for larger images, a discriminator comes in."""
    name = "tokenizer"
    kind = "tokenizer"
    spares = True   # no codes at first

    def __init__(self, data: Data, options: argparse.Namespace):
        preset = options.preset
        self.quantized_from = int(preset.unquantized * preset.tokenizer_steps)
        self.distance = None   # the perceptual one
        self.adversarial_from = int(preset.adversarial_from * preset.tokenizer_steps)
        self.images = to_float(data.held_out.tensors[0][spread(data.held_out, 2000)])
        torch.manual_seed(options.seed)
        model = Tokenizer(preset.tokenizer_config(data.channels)).to(options.device)
        layers = nn.ModuleList([model.encoder, model.decoder])
        optimizers = adamw_and_muon(
            model, layers, preset.tokenizer_lr, 0.0, preset.muon, options.dtype)
        helpers = {}
        if preset.adversarial_weight:
            discriminator = Discriminator(data.channels, preset.discriminator_width)
            helpers["discriminator"] = discriminator.to(options.device)
            # A short memory, as usual: its opponent changes all the time.
            optimizers.append(torch.optim.AdamW(
                discriminator.parameters(), preset.discriminator_lr, betas=(0.5, 0.9),
                weight_decay=0.0, fused=True))
        recipe = {name: getattr(preset, name) for name in TOKENIZER_RECIPE}
        if preset.perceptual_weight and options.perceptual:
            lpips = load_lpips(options.perceptual).to(options.device)
            self.distance = lambda x, y: lpips(x, y).mean()
            recipe["perceptual distance"] = "LPIPS"
        elif preset.perceptual_weight:
            self.classifier_shape = {
                "channels": data.channels,
                "side": preset.image_size,
                "classes": len(data.classes),
            }
            classifier = Classifier(**self.classifier_shape).eval().requires_grad_(False)
            helpers["classifier"] = classifier.to(options.device)
            self.distance = partial(distance_by, classifier)
            recipe["perceptual distance"] = "classifier"
        super().__init__(
            model, optimizers, data.train, preset.tokenizer_steps, preset.tokenizer_batch, 0.0,
            recipe, data, options, helpers)

    def begin(self) -> None:
        if "classifier" in self.helpers:
            say("perceptual distance: by the features of a classifier, trained now on these images")
            # Not on the same draws as the one by which sample.py judges the results.
            images, labels = some_images(self.data, self.options)
            trained = train_classifier(
                images, labels, self.classifier_shape, 1, self.options.device)
            self.helpers["classifier"].load_state_dict(trained.state_dict())

    @torch.no_grad()
    def before_step(self) -> None:
        if self.step != self.quantized_from:
            return
        # Only now is there a latent worth taking codes from. (The average, at ema 0, is the model
        # itself, but never compiled: these batches have other shapes.)
        (rows,) = shuffled(len(self.rows), min(512, len(self.rows)), self.options.seed, 0, 1)
        latents = []
        for part in torch.tensor(rows).split(at_a_time(self.options.preset.image_size)):
            images, _ = self.rows[part.tolist()]
            with self.options.autocast():
                latents.append(self.average.latent(self.to_device(images)))
        self.model.quantizer.start_from(torch.cat(latents))

    def to_device(self, images: Tensor) -> Tensor:
        return to_float(images.to(self.options.device, non_blocking=True))

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Callable]:
        quantize = self.step >= self.quantized_from
        originals = self.to_device(images)
        reconstructions, losses = self.replica(originals, quantize=quantize)
        likeness = losses["likeness"]
        if self.distance:
            losses["perceptual"] = self.distance(originals, reconstructions)
            likeness = likeness + self.options.preset.perceptual_weight * losses["perceptual"]
        total = likeness + losses["codebook"]
        if "discriminator" in self.helpers and self.step >= self.adversarial_from:
            adversary = self.helpers["discriminator"]
            reward = adversary.reward(reconstructions)
            weight = balance(likeness, reward, self.model.decoder.conv_out.weight)
            weight = self.options.preset.adversarial_weight * weight
            own_loss, right = adversary.loss(originals, reconstructions)
            losses |= {
                "adversarial": reward,
                "balance": weight,
                "discriminator": own_loss,
                "discriminator_right": right,
            }
            # One backward pass for both: neither loss has a gradient for the other's weights.
            total = total + weight * reward + own_loss
        losses["total"] = total
        return total, lambda: losses

    def after_step(self) -> None:
        if self.step < self.quantized_from:
            return
        self.model.quantizer.remember()
        settling = self.step >= 0.9 * self.steps
        if self.quantized_from < self.step and self.step % 20 == 0 and not settling:
            self.model.quantizer.revive(self.optimizers[0])

    def held_out_batches(self, count: int) -> Iterator[Tensor]:
        """At most `count` held-out images on the device, as many at a time as a pass takes."""
        for images in self.images[:count].split(at_a_time(self.options.preset.image_size)):
            yield images.to(self.options.device)

    @torch.no_grad()
    def validate(self, model: Tokenizer) -> dict:
        count = len(self.images[:256])
        found = Counter()
        for originals in self.held_out_batches(count):
            with self.options.autocast():
                reconstructions, losses = model(originals)
                if "discriminator" in self.helpers:
                    adversary = self.helpers["discriminator"]
                    _, losses["discriminator_right"] = adversary.loss(originals, reconstructions)
            share = len(originals) / count
            found.update({name: share * loss.item() for name, loss in losses.items()})
        return {**found, "psnr": psnr(found["mse"])}

    def example(self) -> tuple[Tensor, ...]:
        return (self.images[:1].to(self.options.device),)

    def finish(self, model: Tokenizer, log: Log) -> None:
        with self.options.autocast():
            health = model.health(self.held_out_batches(2000))
        log.write(self.steps, "health", **health)
        say_health(health, model.config)
        run = Run(model, None, self.data.classes, self.data.held_out, self.options)
        images = self.images[:36]
        results = run.decode(run.encode(images)[1])
        save_picture(self.options.out / "reconstructions.png", grid_of_pairs(images, results))


def say_health(health: dict, config: TokenizerConfig) -> None:
    used = f"{health['codes_used']:.0%} of {config.vocabulary} codes used"
    print(f"held-out images: PSNR {health['psnr_per_scale'][-1]:.2f} dB; {used}")
    print("  scale   codes  usage  perplexity  PSNR up to here")
    columns = [health[f"{name}_per_scale"] for name in ("codes", "usage", "perplexity", "psnr")]
    for s, codes, usage, perplexity, decibels in zip(config.scales, *columns):
        print(f"  {s:>2}x{s:<3} {codes:>6} {usage:>6.0%} {perplexity:>11.1f} {decibels:>13.2f} dB")


TOKENIZER_RECIPE = (
    "tokenizer_steps", "tokenizer_batch", "tokenizer_lr", "muon", "unquantized", "final_lr",
    "warmup", "perceptual_weight", "adversarial_weight", "adversarial_from", "discriminator_width",
    "discriminator_lr",
)


def distance_by(classifier: Classifier, originals: Tensor, reconstructions: Tensor) -> Tensor:
    return perceptual_distance(classifier.maps(originals), classifier.maps(reconstructions))


VGG_SHA256 = "397923af"   # how it begins
VGG_URL = f"https://download.pytorch.org/models/vgg16-{VGG_SHA256}.pth"


def load_lpips(path: Path) -> nn.Module:
    """The field's perceptual distance, LPIPS (1801.03924), of two batches of images in [-1, 1].

    path: the weights of torchvision's VGG-16, downloaded if they are not there; those on top of it
    come with the package. Raises UserError for any other file, and where the packages are missing.
    """
    try:
        import lpips
    except ImportError as error:
        raise UserError(f"--perceptual needs two more packages, pip install lpips torchvision "
                        f"({in_short(error)})")
    if not path.exists():
        download(VGG_URL, path)
    if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(VGG_SHA256):
        raise UserError(f"{path} is not torchvision's vgg16-{VGG_SHA256}.pth: its SHA-256 is "
                        f"another")
    with blaming(path), torch.no_grad():
        state = torch.load(path, map_location="cpu", weights_only=True)
        distance = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
        for name, parameter in distance.net.named_parameters():
            of_vgg = name.split(".", 1)[1]   # slice2.5.weight, of features.5.weight
            parameter.copy_(state[f"features.{of_vgg}"])
    return distance.eval().requires_grad_(False)


def chosen_tokenizer(data: Data, options: argparse.Namespace) -> Tokenizer:
    """The run's own tokenizer, or the one that --tokenizer names, which the run keeps a copy of."""
    preset = options.preset
    own = options.out / "tokenizer.pt"
    path = options.tokenizer or own
    tokenizer = load_tokenizer(path, preset.scales)
    config = tokenizer.config
    if path.suffix != ".pth" and "training" in load_checkpoint(path, "tokenizer"):
        raise UserError(f"{path} is not trained to its end; --stage tokenizer --resume, in its "
                        f"folder, goes on with it")
    if (config.image_side, config.image_channels) != (preset.image_size, data.channels):
        raise UserError(f"{path} is for images of side {config.image_side} with "
                        f"{config.image_channels} channels, and these are {preset.image_size} with "
                        f"{data.channels}")
    for name, value in vars(config).items():
        flag = "tokenizer_width" if name == "width" else name   # --width is the transformer's
        asked = getattr(options, flag, value)
        if asked != value:
            raise UserError(f"--{flag.replace('_', '-')} {asked} is not that of the tokenizer in "
                            f"{path}, which has {value}")
    if path == own:
        return tokenizer.to(options.device)
    if not own.exists() or load_tokenizer(own).fingerprint() != tokenizer.fingerprint():
        if own.exists() and not options.overwrite:
            raise UserError(f"{options.out} has a tokenizer.pt that is another than {path}; choose "
                            f"another --out")
        if rank_and_ranks()[0] == 0:
            save_checkpoint(own, "tokenizer", config=asdict(config), model=tokenizer.state_dict(),
                            copied_from=str(path))
    return tokenizer.to(options.device)


# --------------------------------------------------------------------------------------------------
# Stage two: the transformer


class VARStage(Stage):
    """Cross entropy between the transformer's logits and the tokens, all scales at once."""
    name = "var"
    kind = "transformer"

    def __init__(self, tokenizer: Tokenizer, data: Data, options: argparse.Namespace):
        preset = options.preset
        self.tokenizer = tokenizer
        tokens, self.held_out_rows = tokens_of(tokenizer, data, options)
        torch.manual_seed(options.seed)
        config = preset.var_config(tokenizer.config, len(data.classes))
        model = VAR(config).to(options.device)
        optimizers = model.optimizers(
            preset.var_lr, preset.weight_decay, preset.muon, options.dtype)
        recipe = {name: getattr(preset, name) for name in VAR_RECIPE}
        recipe["tokenizer"] = tokenizer.fingerprint()
        super().__init__(
            model, optimizers, tokens, preset.var_steps, preset.var_batch, preset.ema, recipe, data,
            options)

    def loss(self, tokens_BL: Tensor, labels_B: Tensor) -> tuple[Tensor, Callable]:
        return self.loss_of(self.replica, tokens_BL, labels_B)

    def loss_of(
        self, model: nn.Module, tokens_BL: Tensor, labels_B: Tensor
    ) -> tuple[Tensor, Callable]:
        """Cross entropy in nats per token; to log are accuracy, and the means of both per scale."""
        tokens_BL = tokens_BL.to(self.options.device).long()
        labels_B = labels_B.to(self.options.device)
        inputs = self.tokenizer.teacher_inputs(tokens_BL)                      # [B, L-1, C]
        logits_BLV = model(labels_B, inputs).float()                           # [B, L, V]
        loss_BL = F.cross_entropy(logits_BLV.transpose(1, 2), tokens_BL, reduction="none")

        def to_log() -> dict[str, Tensor]:
            hit_BL = (logits_BLV.argmax(dim=-1) == tokens_BL).float()
            return {
                "accuracy": hit_BL.mean(),
                "loss_per_scale": self.per_scale(loss_BL.detach()),
                "accuracy_per_scale": self.per_scale(hit_BL),
            }
        return loss_BL.mean(), to_log

    def per_scale(self, values_BL: Tensor) -> Tensor:
        sizes = [s * s for s in self.model.config.scales]
        return torch.stack([part.mean() for part in values_BL.split(sizes, dim=1)])

    @torch.no_grad()
    def validate(self, model: VAR) -> dict:
        rows = self.held_out_rows[spread(self.held_out_rows, 256)]
        means = Counter()
        for tokens_BL, labels_B in zip(*(x.chunk(self.parts) for x in rows)):
            with self.options.autocast():
                loss, to_log = self.loss_of(model, tokens_BL, labels_B)
            share = len(labels_B) / len(rows[1])
            for name, value in {"loss": loss, **to_log()}.items():
                means[name] += share * value
        return {name: value.tolist() for name, value in means.items()}

    def example(self) -> tuple[Tensor, ...]:
        tokens_BL, labels_B = self.held_out_rows[[0]]
        return labels_B, self.tokenizer.teacher_inputs(tokens_BL.to(self.options.device).long())

    def finish(self, model: VAR, log: Log) -> None:
        run = Run(self.tokenizer, model, self.data.classes, self.data.held_out, self.options)
        save_picture(self.options.out / "samples.png", draw_samples(run))


VAR_RECIPE = (
    "var_steps", "var_batch", "var_lr", "muon", "weight_decay", "final_lr", "warmup", "ema",
)


# --------------------------------------------------------------------------------------------------
# Tokens: the tokenizer does not change any more, so they are computed once


def tokens_of(
    tokenizer: Tokenizer, data: Data, options: argparse.Namespace
) -> tuple[TensorDataset, TensorDataset]:
    """The training and the held-out images as tokens [N, L] and labels [N], kept in a file."""
    path = options.tokens or options.out / "tokens.pt"
    made_with = {
        "tokenizer": tokenizer.fingerprint(),
        "precision": options.precision,
        "images": data.key,
    }
    found = kept_tokens(path, made_with, options)
    images = {"held_out": data.held_out, "train": data.train}
    missing = [name for name in images if tokenised(found[name]) < len(images[name])]
    try:
        for name in missing:
            tokenise(tokenizer, images[name], found[name], options, f"tokenise {name}")
    finally:   # Ctrl-C loses nothing of what is done
        if missing and rank_and_ranks()[0] == 0:
            keep_tokens(path, made_with, found)
    train = TensorDataset(*map(torch.cat, zip(*found["train"])))
    held_out = TensorDataset(*map(torch.cat, zip(*found["held_out"])))
    return train, held_out


def tokenised(parts: list[tuple[Tensor, Tensor]]) -> int:
    return sum(len(labels) for _, labels in parts)


def kept_tokens(path: Path, made_with: dict[str, str], options: argparse.Namespace) -> dict:
    """What an earlier training kept: for both sets parts of their tokens and labels, in order.

    Raises UserError where --tokens names a file of anything else, which would be lost.
    """
    nothing = {"held_out": [], "train": []}
    if not path.exists():
        return nothing
    try:
        content = load_checkpoint(path, "set of tokens")
        with blaming(path):
            begun = content["made_with"]
            found = {name: content[name] for name in nothing}
    except UserError as error:
        if options.tokens:
            raise
        say(f"tokens are made anew: {error}")
        return nothing
    for name, value in made_with.items():
        if begun.get(name) != value:
            say(f"tokens are made anew: those in {path} were made with other {name}")
            return nothing
    say(f"tokens are those in {path}")
    return found


def keep_tokens(path: Path, made_with: dict[str, str], found: dict) -> None:
    """A training does not end because its tokens cannot be kept for the next one."""
    try:
        save_checkpoint(path, "set of tokens", made_with=made_with, **found)
    except (UserError, OSError) as error:
        print(f"the tokens are not kept: {in_short(error)}")


@torch.no_grad()
def tokenise(
    tokenizer: Tokenizer, images: Dataset, found: list, options: argparse.Namespace, what: str
) -> None:
    """Append the tokens and the labels of the images that are not in `found` yet, in order."""
    small = torch.int16 if tokenizer.config.vocabulary <= 2**15 else torch.int32
    rank, ranks = rank_and_ranks()
    size = ranks * min(128, at_a_time(tokenizer.config.image_side))
    parts = []
    for begin in range(tokenised(found), len(images), size):
        rows = list(range(begin, min(begin + size, len(images))))
        parts.append(rows + rows[-1:] * (ranks - len(rows)))   # one at least for every process
    loader = read_ahead(images, map(own_part, parts), options)
    for pixels, labels in tqdm(loader, total=len(parts), desc=what, unit="batch", disable=rank > 0):
        with options.autocast():
            tokens = tokenizer.encode(to_float(pixels.to(options.device))).to(small).cpu()
        gathered = [(tokens, labels)] * ranks
        if ranks > 1:
            dist.all_gather_object(gathered, (tokens, labels))
        for tokens, labels in gathered:
            left = len(images) - tokenised(found)
            found.append((tokens[:left], labels[:left]))


# --------------------------------------------------------------------------------------------------
# Data: images as bytes, their labels, and the names of the classes


@dataclass
class Data:
    """train and held_out give bytes [n, channels, side, side] and labels [n] for a list of rows."""
    train: Dataset
    held_out: TensorDataset
    classes: list[str]
    key: str   # of both sets and their order: a training goes on only with the same

    @property
    def channels(self) -> int:
        return self.held_out.tensors[0].shape[1]


HELD_OUT_IMAGES = 10_000        # at most so many are kept in a run's folder, ...
HELD_OUT_BYTES = 2**28          # ... and at most so many bytes of them


def load_data(options: argparse.Namespace) -> Data:
    """Images to train on, and images to hold out."""
    rank, ranks = rank_and_ranks()
    if rank > 0:   # process 0 downloads and decodes what is missing
        dist.barrier()
    side = options.preset.image_size
    if options.data == "shapes":
        train = draw_shapes(20_000, side, seed=2 * options.seed)
        held_out = draw_shapes(1000, side, seed=2 * options.seed + 1)
        data = data_of(train, held_out, SHAPES)
    elif options.data in PUBLISHED:
        read = read_cifar10 if options.data == "cifar10" else read_idx
        sets = read(options.data, options.data_dir, side)
        data = data_of(*sets, PUBLISHED[options.data].classes)
    else:
        data = load_folder(Path(options.data), options)
    if rank == 0 and ranks > 1:
        dist.barrier()
    say(f"{options.data}: {len(data.train)} training and {len(data.held_out)} held-out images, "
        f"{len(data.classes)} classes; to {options.out} on {options.device}, processes: {ranks}")
    return data


def data_of(train: TensorDataset, held_out: TensorDataset, classes: Sequence[str]) -> Data:
    """With a key that follows from what is in the images."""
    digest = hashlib.sha256()
    for tensor in (*train.tensors, *held_out.tensors):
        digest.update(tensor.numpy())
    return Data(train, held_out, list(classes), digest.hexdigest())


def spread(data: TensorDataset, count: int) -> list[int]:
    """At most `count` rows: the first image of every class, then the second of every class, ..."""
    labels_N = data.tensors[1].numpy()
    round_N = np.zeros_like(labels_N)
    for label in np.unique(labels_N):
        own = labels_N == label
        round_N[own] = np.arange(own.sum())
    return np.lexsort((labels_N, round_N))[:count].tolist()


def some_images(data: Data, options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Training images to learn a classifier on: as bytes, no larger than it sees them, and their
    labels."""
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))
    rows = order[:CLASSIFIER_IMAGES].sort().values
    parts = [part.tolist() for part in rows.split(256)]
    images = []
    labels = []
    for pixels, labels_B in read_ahead(data.train, parts, options):
        images.append(averaged_down(pixels.float()).round().byte())
        labels.append(labels_B)
    return torch.cat(images), torch.cat(labels)


SHAPES = ("circle", "ring", "square", "triangle", "star", "cross", "heart", "crescent", "arrow",
          "bar")


def draw_shapes(count: int, side: int, seed: int) -> TensorDataset:
    """The built-in data: a coloured shape on a background that runs from one colour to another."""
    from matplotlib.colors import hsv_to_rgb
    rng = np.random.default_rng(seed)
    labels_N = np.arange(count) % len(SHAPES)
    size_N = rng.uniform(0.28, 0.42, count)
    angle_N = rng.uniform(-0.35, 0.35, count)
    x_N, y_N = 0.5 + rng.uniform(-1, 1, (2, count)) * (0.48 - size_N)
    covers = []
    for label, size, angle, x, y in zip(labels_N, size_N, angle_N, x_N, y_N):
        covers.append(draw_shape(SHAPES[label], size, angle, x, y, side))
    cover_N1HW = np.stack(covers)[:, None].astype(np.float32) / 255

    # One is light and the other dark, so that no shape is hidden; the background's two ends have
    # neighbouring hues.
    hue_2N = rng.random((2, count))
    shift_2N = rng.uniform(-0.12, 0.12, (2, count))

    def two_colours(low: list, high: list, hue_N: np.ndarray) -> np.ndarray:
        """[2, N, 3, 1, 1]. low, high: limits of saturation and value."""
        saturation_2N, value_2N = rng.uniform(low, high, (2, 2, count)).swapaxes(0, 1)
        hsv_2N3 = np.stack([(hue_N + shift_2N) % 1, saturation_2N, value_2N], axis=-1)
        return 255 * hsv_to_rgb(hsv_2N3).astype(np.float32)[..., None, None]

    light = two_colours([[0.3], [0.75]], [[0.65], [0.95]], hue_2N[0])
    dark = two_colours([[0.4], [0.28]], [[0.8], [0.52]], hue_2N[1])
    flip_N111 = rng.random((count, 1, 1, 1)) < 0.5
    shape, _ = np.where(flip_N111, light, dark)
    start, end = np.where(flip_N111, dark, light)
    direction_N111 = rng.uniform(0, 2 * math.pi, (count, 1, 1, 1))
    y_HW, x_HW = (np.mgrid[:side, :side] + 0.5) / side - 0.5
    along_N1HW = np.cos(direction_N111) * x_HW + np.sin(direction_N111) * y_HW
    background_N3HW = start + (end - start) * (0.5 + 0.7 * along_N1HW.astype(np.float32))
    images_N3HW = background_N3HW + (shape - background_N3HW) * cover_N1HW
    pixels = images_N3HW.clip(0, 255).round().astype(np.uint8)
    return TensorDataset(torch.from_numpy(pixels), torch.from_numpy(labels_N))


def draw_shape(
    name: str, size: float, angle: float, x: float, y: float, side: int
) -> np.ndarray:
    """Coverage [side, side] in [0, 255] of one shape: drawn four times as large, then averaged.

    size: half the shape's extent; x, y: its centre; both as shares of the side. angle: in radians.
    A point is a complex number, so a turn is a product.
    """
    canvas = Image.new("L", (4 * side, 4 * side))
    draw = ImageDraw.Draw(canvas)
    turn = size * np.exp(1j * angle)

    def place(points):
        return 4 * side * (points * turn + x + 1j * y)

    def disc(centre: float, radius: float, fill: int) -> None:
        middle = place(centre)
        r = 4 * side * radius * size
        box = (middle.real - r, middle.imag - r, middle.real + r, middle.imag + r)
        draw.ellipse(box, fill=fill)

    if name in OUTLINES:
        points = place(np.array(OUTLINES[name]))
        draw.polygon(list(zip(points.real, points.imag)), fill=255)
    else:
        disc(0, 0.95, 255)
    if name == "ring":
        disc(0, 0.5, 0)
    if name == "crescent":
        disc(0.45, 0.75, 0)
    return np.asarray(canvas.reduce(4))


def spikes(count: int, inner: float) -> np.ndarray:
    radius = np.array([1.0, inner] * count)
    return -1j * radius * np.exp(1j * np.pi / count * np.arange(2 * count))


def heart(points: int) -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, points)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t)
    y = y - 2 * np.cos(3 * t) - np.cos(4 * t)
    return 0.063 * (x - 1j * y)


OUTLINES = {   # x + 1j y, from -1 to 1, y down
    "square": [-0.8 - 0.8j, 0.8 - 0.8j, 0.8 + 0.8j, -0.8 + 0.8j],
    "triangle": [-1j, 0.95 + 0.75j, -0.95 + 0.75j],
    "star": spikes(5, 0.48),
    "cross": [-0.3 - 1j, 0.3 - 1j, 0.3 - 0.3j, 1 - 0.3j, 1 + 0.3j, 0.3 + 0.3j,
              0.3 + 1j, -0.3 + 1j, -0.3 + 0.3j, -1 + 0.3j, -1 - 0.3j, -0.3 - 0.3j],
    "heart": heart(60),
    "arrow": [-1j, 0.85 - 0.05j, 0.32 - 0.05j, 0.32 + 1j, -0.32 + 1j, -0.32 - 0.05j,
              -0.85 - 0.05j],
    "bar": [-1 - 0.3j, 1 - 0.3j, 1 + 0.3j, -1 + 0.3j],
}


@dataclass(frozen=True)
class Published:
    """A published data set: where it is downloaded from, and the SHA-256 of its files' content.

    Of the idx files that is what they decompress to, since they are compressed in several ways.
    """
    url: str
    files: dict[str, str]
    classes: Sequence[str]


IDX_FILES = ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz",
             "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")
PUBLISHED = {
    "mnist": Published("https://storage.googleapis.com/cvdf-datasets/mnist/", dict(zip(IDX_FILES, (
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ))), "0123456789"),
    "fashion-mnist": Published("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/", dict(
        zip(IDX_FILES, (
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        ))),
        ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
         "boot")),
    "cifar10": Published("https://www.cs.toronto.edu/~kriz/", {
        "cifar-10-binary.tar.gz":
            "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    }, ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship",
        "truck")),
}
SYSTEM_DATA = Path("/usr/share/datasets")   # where Debian's dataset-* packages put theirs


def known_file(name: str, file: str, data_dir: Path) -> bytes:
    """The content of a published file, found or downloaded. Raises UserError for any other."""
    # The data sets in MNIST's format have files of the same names.
    places = [folder / file for folder in (data_dir / name, SYSTEM_DATA / name, data_dir)]
    path = next((place for place in places if place.exists()), data_dir / name / file)
    if not path.exists():
        download(PUBLISHED[name].url + file, path)
    content = path.read_bytes()
    if file.endswith(".gz") and not file.endswith(".tar.gz"):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path} cannot be read as a gzip file: {error}")
    if hashlib.sha256(content).hexdigest() != PUBLISHED[name].files[file]:
        raise UserError(f"{path} is not the published file, its SHA-256 is another; remove it")
    return content


def download(url: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    socket.setdefaulttimeout(30)   # seconds without a byte
    try:
        torch.hub.download_url_to_file(url, str(path))
    except OSError as error:
        raise UserError(f"cannot download {url} ({error}); fetch it by other means, as {path}")


def read_idx(name: str, data_dir: Path, side: int) -> list[TensorDataset]:
    """MNIST's format: a header of 16 or 8 bytes, then a byte for each pixel or each label."""
    sets = []
    for split in ("train", "t10k"):
        pixels = known_file(name, f"{split}-images-idx3-ubyte.gz", data_dir)
        labels = known_file(name, f"{split}-labels-idx1-ubyte.gz", data_dir)
        images = np.frombuffer(pixels, np.uint8, offset=16).reshape(-1, 1, 28, 28)
        sets.append(fit_side(images, np.frombuffer(labels, np.uint8, offset=8), side))
    return sets


def read_cifar10(name: str, data_dir: Path, side: int) -> list[TensorDataset]:
    """Records of one label byte and 3072 pixel bytes: planes of 32 x 32 red, green and blue."""
    content = known_file(name, "cifar-10-binary.tar.gz", data_dir)
    sets = []
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for files in ([f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"]):
            parts = [archive.extractfile(f"cifar-10-batches-bin/{file}").read() for file in files]
            records = np.frombuffer(b"".join(parts), np.uint8).reshape(-1, 3073)
            sets.append(fit_side(records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0], side))
    return sets


def fit_side(images: np.ndarray, labels: np.ndarray, side: int) -> TensorDataset:
    """Small images are padded with black, 28 to 32 say; large ones are averaged down."""
    border = side - images.shape[-1]
    pixels = torch.tensor(images)
    if border >= 0:
        before = border // 2
        after = border - before
        pixels = F.pad(pixels, (before, after, before, after))
    else:
        pixels = F.interpolate(pixels.float(), size=(side, side), mode="area").round().byte()
    return TensorDataset(pixels, torch.tensor(labels, dtype=torch.int64))


# --------------------------------------------------------------------------------------------------
# Data: folders of images, decoded once


DISK_SHARE = 0.25   # of the free disk: a folder that needs more, decoded, is read as training goes


class FolderImages(Dataset):
    """Image files, read when asked for; for one that cannot be read, which is named, the next one
    stands in."""

    def __init__(self, root: Path, files: list[tuple[int, Path]], side: int, channels: int):
        """files: the label and the path of each."""
        self.labels = torch.tensor([label for label, _ in files])
        self.paths = [path for _, path in files]
        self.shape = (channels, side, side)
        self.unreadable: set[int] = set()
        # Of the names, sizes and times of the files, wherever the folder lies:
        digest = hashlib.sha256(repr(self.shape).encode())
        for path in self.paths:
            status = path.stat()
            about = (str(path.relative_to(root)), status.st_size, status.st_mtime_ns)
            digest.update(repr(about).encode())
        self.key = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        images, found = zip(*(self.first_readable(row) for row in rows))
        return torch.from_numpy(np.stack(images)), self.labels[list(found)]

    def first_readable(self, row: int) -> tuple[np.ndarray, int]:
        """The image of a row or of the next one that can be read, and which that was."""
        for i in (*range(row, len(self)), *range(row)):
            if i in self.unreadable:
                continue
            image = try_to_read(self.paths[i], self.shape)
            if image is not None:
                return image, i
            self.unreadable.add(i)
        raise UserError(f"none of the {len(self)} images can be read")


def try_to_read(path: Path, shape: tuple[int, int, int]) -> np.ndarray | None:
    """Bytes [channels, side, side], or None for what is no image."""
    channels, side, _ = shape
    try:
        return read_image(path, side, channels)
    except UserError as error:   # no tqdm.write: a process that was forked may find its lock taken
        print(f"skipped: {in_short(error)}", file=sys.stderr)
        return None


class DecodedImages(Dataset):
    """The images of a folder, from a file that is mapped into memory. It holds a record for each: a
    byte, 1 if the image could be read, and its pixels."""

    def __init__(self, records_NR: np.ndarray, files: FolderImages):
        self.records_NR = records_NR
        self.rows = np.flatnonzero(records_NR[:, 0] == 1)
        self.labels = files.labels[self.rows]
        self.shape = files.shape

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        pixels = self.records_NR[self.rows[rows], 1:]
        return torch.from_numpy(pixels.reshape(-1, *self.shape)), self.labels[rows]


def load_folder(root: Path, options: argparse.Namespace) -> Data:
    """One sub-folder per class, named for it; every twentieth image of a class is held out."""
    classes, files = list_folder(root)
    train = [file for own in files for i, file in enumerate(own) if i % 20]
    rounds = chain.from_iterable(zip_longest(*(own[::20] for own in files)))
    held_out = [file for file in rounds if file]   # the first of every class, then the second, ...
    side, channels = options.preset.image_size, options.channels
    bound = min(HELD_OUT_IMAGES, HELD_OUT_BYTES // (channels * side * side))
    train = FolderImages(root, train, side, channels)
    held_out = FolderImages(root, held_out[:bound], side, channels)
    kept = decoded(held_out, "held_out", options)
    images = decoded(train, "train", options)
    if not len(kept):
        raise UserError(f"{root} has no image left to hold out")
    lost = set(range(len(classes))) - set(images.labels.tolist())
    if lost:
        raise UserError(f"{root / classes[min(lost)]} has no image left to train on")
    key = f"{held_out.key} {len(kept)} {train.key} {len(images)}"
    return Data(images, TensorDataset(*kept[range(len(kept))]), classes, key)


def list_folder(root: Path) -> tuple[list[str], list[list[tuple[int, Path]]]]:
    """The names of the classes, and of each the label and the path of its images."""
    if not root.is_dir():
        raise UserError(f"--data {root} is neither a folder nor one of shapes, "
                        f"{', '.join(PUBLISHED)}")
    classes = sorted(x.name for x in root.iterdir() if x.is_dir() and not x.name.startswith("."))
    if not classes:
        raise UserError(f"{root} has no sub-folders; it needs one with images for each class")
    files = []
    for label, name in enumerate(classes):
        paths = sorted(path for path in (root / name).rglob("*")
                       if path.suffix.lower() in IMAGE_ENDINGS and path.is_file())
        if len(paths) < 2:
            raise UserError(f"{root / name} has {len(paths)} images ({', '.join(IMAGE_ENDINGS)}); "
                            f"two are needed, one to train on and one to hold out")
        files.append([(label, path) for path in paths])
    return classes, files


def decoded(
    files: FolderImages, name: str, options: argparse.Namespace
) -> DecodedImages | FolderImages:
    """The images of a folder, from the file in which an earlier run left them, or decoded now; the
    files themselves, if decoded they would take too much of the disk.

    The file grows by a record after the other, so a run that was stopped goes on at its end.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{name}-{files.key[:16]}.images"
    size = 1 + math.prod(files.shape)
    gigabytes = len(files) * size / 1e9
    free = shutil.disk_usage(options.out).free / 1e9
    if not path.exists() and gigabytes > DISK_SHARE * free:
        say(f"the {name} images would take {gigabytes:.0f} GB decoded, over {DISK_SHARE:.0%} of "
            f"the {free:.0f} GB that are free: they are read as training goes")
        files.first_readable(0)   # there is one, or this ends here
        return files
    with open(path, "ab") as file:
        done = file.tell() // size
        file.truncate(done * size)   # a part of a record
        rows = range(done, len(files))
        images = DataLoader(files.paths, batch_size=None, sampler=rows,
                            num_workers=min(options.workers, len(rows)),
                            collate_fn=partial(try_to_read, shape=files.shape),
                            worker_init_fn=partial(only_read, options.lock))
        for image in tqdm(images, desc=f"decode {name}", unit="image", disable=not rows):
            file.write(bytes(size) if image is None else b"\1" + image.tobytes())
    images = DecodedImages(np.memmap(path, np.uint8, "r", shape=(len(files), size)), files)
    missing = len(files) - len(images)
    if missing:
        say(f"{missing} of {len(files)} {name} images could not be read and are left out; remove "
            f"{path} to try again")
    return images


# --------------------------------------------------------------------------------------------------
# Presets: the shape of a model and of its training


def several(read: Callable) -> Callable:
    """The type of a flag that is a list, as 1,2,4."""
    def read_all(text: str) -> tuple:
        return tuple(read(part) for part in text.split(","))
    return read_all


SIZE = number(int, 1, 2**16)
STEPS = number(int, 0)
RATE = number(float, 1e-12, 1e30)
PART = number(float, 0, 1)
WEIGHT = number(float, 0)
BELOW_1 = number(float, 0, 0.999999)
YES_OR_NO = None   # --flag and --no-flag


def option(default: Any, read: Callable | None, text: str):
    """A value of a preset and a flag: `read` makes it of the flag's text, or says what is wrong."""
    return field(default=default, metadata={"read": read, "help": text})


@dataclass(frozen=True)
class Preset:
    image_size: int = option(32, SIZE, "side of the images")
    scales: tuple[int, ...] | None = option(
        None, several(SIZE),
        "sides of the token maps, from 1 to the latent's; if not given, 1, 2, 4, ... up to it")
    vocabulary: int = option(256, SIZE, "codes in the codebook")
    code_channels: int = option(8, SIZE, "channels of a code")
    tokenizer_width: int = option(16, SIZE, "the tokenizer's channels at full resolution")
    multipliers: tuple[int, ...] = option(
        (1, 2, 4), several(SIZE),
        "of that width, per resolution; each but the first halves the side")
    blocks: int = option(1, SIZE, "residual blocks per resolution")
    phis: int = option(4, SIZE, "distinct phi convolutions")
    norm_groups: int = option(2, SIZE, "groups of the tokenizer's group norms")
    tokenizer_steps: int = option(1000, COUNT, "training steps of the tokenizer")
    tokenizer_batch: int = option(8, SIZE, "images per step of the tokenizer")
    tokenizer_lr: float = option(1.5e-3, RATE, "peak learning rate of the tokenizer")
    unquantized: float = option(
        0.1, BELOW_1, "share of the tokenizer's steps, at the start, without quantization")
    perceptual_weight: float = option(
        0.0, WEIGHT, "weight of the perceptual distance in the tokenizer's loss; 0 is without")
    adversarial_weight: float = option(
        0.0, WEIGHT, "weight of the discriminator against all else, as it pulls at the decoder's "
        "last layer; 0 is without")
    adversarial_from: float = option(
        0.3, BELOW_1, "share of the tokenizer's steps, at the start, without the discriminator")
    discriminator_width: int = option(32, SIZE, "the discriminator's channels at half resolution")
    discriminator_lr: float = option(2e-4, RATE, "peak learning rate of the discriminator")
    depth: int = option(6, SIZE, "layers of the transformer")
    width: int = option(64, SIZE, "width of the transformer")
    heads: int = option(4, SIZE, "attention heads")
    shared_adaln: bool = option(False, YES_OR_NO, "one AdaLN modulation shared by all layers")
    normalise_qk: bool = option(True, YES_OR_NO, "unit queries and keys with a learned scale")
    label_dropout: float = option(
        0.1, PART, "share of labels replaced by the null class in training")
    drop_path: float = option(
        0.0, BELOW_1, "stochastic depth of the last layer; the first has none")
    last_scales: int | None = option(
        None, COUNT, "how many scales a token sees, its own among them; if not given, all so far")
    var_steps: int = option(2000, COUNT, "training steps of the transformer")
    var_batch: int = option(32, SIZE, "images per step of the transformer")
    var_lr: float = option(1.5e-2, RATE, "peak learning rate of the transformer")
    muon: bool = option(
        True, YES_OR_NO, "Muon instead of AdamW for the matrices and convolutions inside layers")
    weight_decay: float = option(0.05, WEIGHT, "of the transformer's matrices")
    final_lr: float = option(0.0, PART, "learning rate at the end, as a share of the peak")
    warmup: int = option(30, STEPS, "steps of linear warm-up, in both stages")
    ema: float = option(
        0.95, BELOW_1,
        "decay of the running average of the transformer's weights, which is what is kept")

    def tokenizer_config(self, image_channels: int) -> TokenizerConfig:
        return TokenizerConfig(
            scales=self.scales, vocabulary=self.vocabulary, code_channels=self.code_channels,
            image_channels=image_channels, width=self.tokenizer_width,
            multipliers=self.multipliers, blocks=self.blocks, phis=self.phis,
            norm_groups=self.norm_groups)

    def var_config(self, tokenizer: TokenizerConfig, classes: int) -> VARConfig:
        return VARConfig(
            scales=tokenizer.scales, vocabulary=tokenizer.vocabulary,
            code_channels=tokenizer.code_channels, classes=classes, depth=self.depth,
            width=self.width, heads=self.heads, shared_adaln=self.shared_adaln,
            normalise_qk=self.normalise_qk, label_dropout=self.label_dropout,
            drop_path=self.drop_path, last_scales=self.last_scales)


PRESETS = {
    "tiny": Preset(),
    "cifar": Preset(
        scales=(1, 2, 3, 4, 6, 8), vocabulary=1024, code_channels=32, tokenizer_width=96,
        multipliers=(1, 2, 2), blocks=2, norm_groups=32, tokenizer_steps=20_000,
        tokenizer_batch=256, tokenizer_lr=4e-4, depth=12, width=768, heads=12, drop_path=0.05,
        var_steps=40_000, var_batch=256, var_lr=3e-4, muon=False, final_lr=0.05, warmup=1000,
        ema=0.9995),
    # Thousands of images, a folder of one's own say. On two CPU cores without AVX-512, by its first
    # steps: 43 minutes for the tokenizer and 35 for the transformer.
    "pixels64": Preset(
        image_size=64, scales=(1, 2, 3, 4, 6, 8), vocabulary=512, code_channels=16,
        multipliers=(1, 2, 4, 8), tokenizer_steps=3600, tokenizer_lr=1e-3, perceptual_weight=0.1,
        adversarial_weight=0.1, depth=6, width=256, var_steps=1000, var_lr=7e-3,
        warmup=100, ema=0.99),
    # The published d16 geometry, and its recipe: 200 epochs of ImageNet in batches of 768.
    "imagenet256": Preset(
        image_size=256, scales=PUBLISHED_SCALES, vocabulary=4096, code_channels=32,
        tokenizer_width=160, multipliers=(1, 1, 2, 2, 4), blocks=2, norm_groups=32,
        tokenizer_steps=400_000, tokenizer_batch=128, tokenizer_lr=1e-4, perceptual_weight=1.0,
        adversarial_weight=0.4, discriminator_width=64, depth=16, width=1024,
        heads=16, drop_path=0.1 * 16 / 24, var_steps=333_000, var_batch=768, var_lr=3e-4,
        muon=False, final_lr=0.1, warmup=6000, ema=0.9999),
}


# --------------------------------------------------------------------------------------------------
# The command line


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Train VAR: the tokenizer, then the transformer.")
    add = parser.add_argument
    add("--data", default="shapes",
        help=f"shapes (drawn), {', '.join(PUBLISHED)}, or a folder with a sub-folder of images for "
             f"each class")
    add("--data-dir", type=Path, default=Path("data"),
        help="where known data sets are looked for first, and downloaded to")
    add("--channels", type=int, choices=(1, 3), default=3,
        help="3 for colour or 1 for grey, of images in a folder")
    add("--out", type=Path, help="folder to write to; if not given, out/ and the name of the data")
    add("--stage", choices=("all", "tokenizer", "var"), default="all", help="what to train")
    add("--tokenizer", type=Path,
        help="train the transformer on this tokenizer, a .pt of this program or a published .pth; "
             "the run keeps a copy")
    add("--perceptual", type=Path, metavar="FILE",
        help="torchvision's VGG-16 (vgg16-397923af.pth), downloaded if it is not there, for LPIPS "
             "as the perceptual distance; if not given, it is that of a classifier trained on the "
             "same images")
    add("--tokens", type=Path, metavar="FILE",
        help="where the images' tokens are kept; if not given, tokens.pt in the run's folder")
    anew = parser.add_mutually_exclusive_group()
    anew.add_argument("--resume", action="store_true",
                      help="go on from the checkpoints in the folder")
    anew.add_argument("--overwrite", action="store_true",
                      help="start anew in a folder that holds a training, which is lost")
    add("--checkpoint-every", type=COUNT, default=1000, help="steps between checkpoints")
    add("--seed", type=SEED, default=0, help="of every random draw")
    parser.add_computer()
    add("--compile", action="store_true",
        help="compile the models with torch.compile, which takes a minute or two at first")
    add("--grad-accumulation", type=COUNT, metavar="PARTS",
        help="compute a step's batch in this many parts, to need less memory; if not given, in as "
             "many as a GPU's memory asks for")
    add("--checkpoint-activations", action="store_true",
        help="keep only what enters a layer for the backward pass and compute the rest again: less "
             "memory, more time")
    add("--workers", type=STEPS, default=min(8, os.cpu_count() or 1),
        help="processes that read the images of a folder")
    add_preset(parser)
    parser.set_defaults(   # of the pictures that a run ends with
        **FILTERS, batch=100, classes=None, per_class=10, progress=False, gif=None)
    parser.set_defaults(lock=None)   # `main` takes it
    return parser.parse_args(arguments)


def add_preset(parser: Parser) -> None:
    """A flag for every value of a preset, too; those that are not given stay unset."""
    parser.add_argument(
        "--preset", choices=PRESETS, default="tiny",
        help="a size of model and training; the flags below change single values of it")
    group = parser.add_argument_group("values of the preset (the defaults shown are those of tiny)")
    for value in fields(Preset):
        flag = "--" + value.name.replace("_", "-")
        text = value.metadata["help"]
        if value.default is not None:
            text += f" (default: {value.default})"
        how = {"type": value.metadata["read"]}
        if how["type"] is YES_OR_NO:
            how = {"action": argparse.BooleanOptionalAction}
        group.add_argument(flag, **how, default=argparse.SUPPRESS, help=text)


def settle(options: argparse.Namespace) -> None:
    """Turn flags into what they mean: options.preset and options.device are names before and the
    things themselves after.

    Raises UserError for what cannot be, or would go wrong later, perhaps after days of training.
    """
    if options.stage == "tokenizer" and options.tokenizer:
        raise UserError("--tokenizer is for the transformer's training, and --stage tokenizer is "
                        "without it")
    folder = Path(options.data).resolve()
    options.out = options.out or Path("out") / folder.name
    if options.data in ("shapes", *PUBLISHED):
        if options.channels != 3:
            raise UserError(f"--channels is for a folder of images; {options.data} has channels of "
                            f"its own")
    elif options.out.resolve().is_relative_to(folder):
        raise UserError(f"--out {options.out} lies in --data {options.data}, and its pictures "
                        f"would be taken for data; name a folder elsewhere")
    options.stages = ["tokenizer", "var"] if options.stage == "all" else [options.stage]
    if options.tokenizer:
        options.stages = ["var"]
    options.preset = settle_preset(options)
    if options.perceptual and not options.preset.perceptual_weight:
        raise UserError("--perceptual names the weights of a perceptual distance, and "
                        "--perceptual-weight is 0")
    if options.device == "cuda" and dist.is_torchelastic_launched():
        options.device = f"cuda:{os.environ['LOCAL_RANK']}"
    settle_device(options)
    join_processes(options.device)
    if options.compile:
        check_compiler(options.device)
        # `balance` goes back through a compiled decoder before the step does.
        torch._functorch.config.donated_buffer = False
    read_log(options.out / "log.jsonl")
    if options.tokens and options.tokens.exists():
        load_checkpoint(options.tokens, "set of tokens")
    parts = rank_and_ranks()[1] * (options.grad_accumulation or 1)
    for name in options.stages:
        batch = getattr(options.preset, f"{name}_batch")
        if batch % parts:
            raise UserError(f"--{name}-batch {batch} does not divide into {parts} parts, for so "
                            f"many processes times --grad-accumulation")
        path = options.out / f"{name}.pt"
        if path.exists() and not (options.resume or options.overwrite):
            raise UserError(f"{path} is there already: --resume goes on with it, --overwrite "
                            f"starts anew, --out names another folder")


def settle_preset(options: argparse.Namespace) -> Preset:
    """The preset with the values that were given instead of its own."""
    names = [value.name for value in fields(Preset)]
    given = {name: getattr(options, name) for name in names if hasattr(options, name)}
    preset = replace(PRESETS[options.preset], **given)
    downsampling = 2 ** (len(preset.multipliers) - 1)
    side = preset.image_size // downsampling   # of the latent
    if preset.scales is None or ("scales" not in given and preset.scales[-1] != side):
        doubling = [2**k for k in range(side.bit_length()) if 2**k < side]
        preset = replace(preset, scales=(*doubling, max(1, side)))
    if given.keys() & {"image_size", "multipliers"} and "scales" not in given:
        print(f"images of side {preset.image_size} are tokenised at scales "
              f"{','.join(map(str, preset.scales))}")
    try:
        config = preset.tokenizer_config(options.channels)
        preset.var_config(config, classes=1)
    except ValueError as error:
        raise UserError(str(error))
    if config.image_side != preset.image_size:
        raise UserError(f"--image-size {preset.image_size} does not fit: scales up to "
                        f"{preset.scales[-1]} at downsampling {downsampling} are images of "
                        f"{config.image_side}")
    if preset.adversarial_weight and preset.image_size < 8:
        raise UserError(f"--adversarial-weight: the discriminator halves the side three times, and "
                        f"--image-size {preset.image_size} is below 8")
    if options.device.startswith("cuda") and not 16 <= preset.width // preset.heads <= 128:
        raise UserError(f"--width {preset.width} over --heads {preset.heads} must be 16 to 128 on "
                        f"a GPU")
    return preset


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[int | None]:
    """Two trainings would write over each other's files. The lock is gone with the process, however
    that ends; Windows has none, nor have some network disks."""
    if fcntl is None or rank_and_ranks()[0] > 0:
        yield None
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise UserError(f"another training is writing to {folder}; name another --out")
    except OSError:   # a disk without locks
        pass
    try:
        yield lock
    finally:
        os.close(lock)
        with contextlib.suppress(OSError):   # it is not empty, unless nothing came of the training
            folder.rmdir()


if __name__ == "__main__":
    run_program(main)
