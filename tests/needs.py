"""What a preset needs: hours, memory and disk, counted without a GPU.

    python -m tests.needs imagenet256
    python -m tests.needs --cards        # every preset on the cards that readers have

Training steps of both stages are gone through on tensors without numbers, in bf16. Hours are those
of the arithmetic alone; the optimizer and reading the images come on top.
"""
from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import TensorDataset
from torch.utils.flop_counter import FlopCounterMode

import train
from support.cli import COUNT, Parser, number, run_program
from support.data import Data
from support.devices import PEAK_TFLOPS, Machine, forward_flops
from support.losses import DetailLosses
from support.presets import PRESETS, Preset
from tests.benchmark import counting, training_inputs
from var import VAR, VARConfig

WEIGHT_BYTES = 22   # fp32: weight, gradient, Adam's two moments, ema; and a copy in bf16
RESULTS = 1.25      # what is passed from layer to layer, beside what is kept
CARDS = {"Tesla T4": 16, "RTX 3060": 12, "RTX 4090": 24, "A100": 80, "H100": 80}   # GB
SHARE_OF_PEAK = 0.4      # that products reach in training: a guess until it is measured
SHARE_OF_MEMORY = 0.9    # that is left for tensors
PYTORCH_BACKEND = 1.5    # times as much is kept for the backward pass, where Triton is not used

POSITIVE = number(float, 1e-3)
IN_BF16 = Machine(torch.device("cpu"), torch.bfloat16)
CHANNELS = 3        # of images


@dataclass
class Needs:
    """What a stage needs: its weights, and for a training step of one image the FLOP and the bytes
    that the forward pass keeps for the backward pass."""
    weights: int
    flops: int
    bytes_kept: int


def of_tokenizer(preset: Preset, classes: int) -> Needs:
    """With all losses that the preset has, the perceptual one by a classifier."""
    labels_B = torch.zeros(2, dtype=torch.int64)
    images = torch.zeros(2, CHANNELS, preset.image_size, preset.image_size, dtype=torch.uint8)
    rows = TensorDataset(images, labels_B)
    names = [str(label) for label in range(classes)]
    settings = train.Settings(preset, IN_BF16, Path())
    stage = train.TokenizerStage(Data(rows, rows, names, ""), settings)
    stage.step = stage.steps - 1
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    stage.counts_V = mode.from_tensor(stage.counts_V)
    for model in (stage.model, stage.helpers):
        without_numbers(model, mode)
    # The counter follows calls of modules, and stumbles where one is handed a weight.
    unfollowed = mock.patch.object(DetailLosses, "__call__", DetailLosses.forward)
    kept = []
    for batch in (1, 2):
        keep = Keep()
        plain = sdpa_kernel(SDPBackend.MATH)   # the fused one is not counted
        with mode, unfollowed, plain, FlopCounterMode(display=False) as counter:
            with IN_BF16.autocast(), saved_tensors_hooks(keep, lambda tensor: tensor):
                loss, _ = stage.loss(stage.model, images[:batch].clone(), labels_B[:batch].clone())
            if batch == 2:   # whose FLOP are told
                loss.backward()
        kept.append(keep.bytes())
    weights = count_weights(stage.model) + count_weights(stage.helpers)
    return Needs(weights, counter.get_total_flops() // 2, kept[1] - kept[0])


def without_numbers(model: nn.Module, mode: FakeTensorMode) -> None:
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            fake = mode.from_tensor(weight.detach())
            setattr(module, name, nn.Parameter(fake, weight.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, mode.from_tensor(buffer))


def of_transformer(preset: Preset, classes: int) -> Needs:
    """By our kernels, which keep no attention weights."""
    config = VARConfig(**preset.var_shape(classes))
    model = VAR(config).train()
    kept = []
    for batch in (1, 2):
        keep = Keep()
        with counting(), saved_tensors_hooks(keep, lambda tensor: tensor):
            labels_B, read_BlC, tokens_BL = training_inputs(config, batch, torch.device("cpu"))
            logits_BLV = model(labels_B, read_BlC).float()
            F.cross_entropy(logits_BLV.transpose(1, 2), tokens_BL)
        kept.append(keep.bytes())
    labels_B, read_BlC, _ = training_inputs(config, 1, torch.device("cpu"))
    flops = 3 * forward_flops(model, labels_B, read_BlC)   # backward is twice forward
    return Needs(count_weights(model), flops, kept[1] - kept[0])


def count_weights(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())


class Keep:
    """Holds what autograd keeps, each tensor once."""

    def __init__(self):
        self.tensors: dict[int, Tensor] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        self.tensors[id(tensor)] = tensor
        return tensor

    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def both_stages(preset: Preset, classes: int) -> list[tuple[int, int, Needs]]:
    """Steps, images of a step, and needs of the tokenizer and of the transformer."""
    return [(preset.tokenizer_steps, preset.tokenizer_batch, of_tokenizer(preset, classes)),
            (preset.var_steps, preset.var_batch, of_transformer(preset, classes))]


def hours_on(card: str, steps: int, batch: int, needs: Needs) -> float:
    """Of all steps, by their arithmetic."""
    return steps * batch * needs.flops / (SHARE_OF_PEAK * PEAK_TFLOPS[card] * 1e12) / 3600


def micro_batches_on(card: str, stages: list[tuple[int, int, Needs]]) -> int | None:
    """The least --grad-accumulation with which both stages fit; None if not even images one by one
    do."""
    more = PYTORCH_BACKEND if card == "Tesla T4" else 1

    def fits(batch: int, needs: Needs, count: int) -> bool:
        images = batch / count * needs.bytes_kept * RESULTS * more
        return needs.weights * WEIGHT_BYTES + images < SHARE_OF_MEMORY * CARDS[card] * 1e9

    batches = [batch for _, batch, _ in stages]
    counts = [n for n in range(1, min(batches) + 1) if not any(batch % n for batch in batches)]
    return next((n for n in counts if all(fits(batch, needs, n) for _, batch, needs in stages)), None)


def print_cards(presets: list[str], classes: int) -> None:
    print(f"Hours of the tokenizer + the transformer, by FLOPs at {SHARE_OF_PEAK:.0%} of a card's peak, "
          f"and the least\n--grad-accumulation: estimates until somebody measures them.")
    print(f"{'':12}{'TFLOP/s':>9}{'GB':>4}" + "".join(f"{preset:>22}" for preset in presets))
    needs = [both_stages(PRESETS[preset], classes) for preset in presets]
    for card, memory in CARDS.items():
        row = f"{card:12}{PEAK_TFLOPS[card]:9}{memory:4}"
        for stages in needs:
            hours = [hours_on(card, *stage) for stage in stages]
            hours = " + ".join(f"{hour:,.{0 if hour > 10 else 2}f}" for hour in hours)
            row += f"{f'{hours}; {micro_batches_on(card, stages)}':>22}"
        print(row)


def main() -> None:
    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")   # PyTorch's own
    parser = Parser(description="What a preset needs, counted without a GPU.")
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("preset", nargs="?", choices=PRESETS)
    what.add_argument("--cards", action="store_true", help="all presets, on all cards of CARDS")
    add("--images", type=COUNT, default=1_281_167, help="to train on (default: ImageNet's)")
    add("--classes", type=COUNT, default=1000, help="of them (default: 1000)")
    add("--rate", type=POSITIVE, default=400, help="TFLOP/s that a card reaches (default: 400)")
    add("--memory", type=POSITIVE, default=80, help="GB that a card has (default: 80)")
    asked = parser.parse_args()
    if asked.cards:
        print_cards(list(PRESETS), asked.classes)
        return
    preset = PRESETS[asked.preset]
    print(f"{asked.preset}, {asked.images:,} images, {asked.rate:g} TFLOP/s and "
          f"{asked.memory:g} GB a card")
    print(f"{'':12}{'weights':>9}{'GFLOP':>9}{'hours an epoch':>16}{'on 8':>7}"
          f"{'GB, weights':>13}{'an image':>10}{'images that fit':>17}")
    for name, count in (("tokenizer", of_tokenizer), ("transformer", of_transformer)):
        needs = count(preset, asked.classes)
        hours = needs.flops * asked.images / asked.rate / 1e12 / 3600
        own = needs.weights * WEIGHT_BYTES / 1e9
        image = needs.bytes_kept * RESULTS / 1e9
        print(f"{name:12}{needs.weights / 1e6:8.1f}M{needs.flops / 1e9:9.3g}{hours:16.2f}"
              f"{hours / 8:7.2f}{own:13.1f}{image:10.2f}{(asked.memory - own) // image:17.0f}")
    pixels = asked.images * CHANNELS * preset.image_size**2 / 1e9
    tokens = asked.images * 2 * sum(s * s for s in preset.scales) / 1e9
    print(f"disk: {pixels:.1f} GB of images, decoded, and {tokens:.1f} GB of tokens")


if __name__ == "__main__":
    run_program(main)
