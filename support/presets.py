"""The values of a training, the sizes they come in, and a flag for each."""
from __future__ import annotations

from argparse import SUPPRESS, BooleanOptionalAction, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from support.checkpoint import blaming, check_made_with, load_checkpoint
from support.cli import (
    COUNT, GROWTH, GUIDANCE, PART, SEED, Parser, UserError, add_device_flags, number, place,
    several,
)
from support.data import PUBLISHED
from support.devices import own_cores, say
from support.watching import summary_writer

SIZE = number(int, 1, 2**16)
STEPS = number(int, 0)
RATE = number(float, 1e-12, 1e30)
WEIGHT = number(float, 0)
BELOW_1 = number(float, 0, 0.999999)
YES_OR_NO = None   # --flag and --no-flag


def option(default: Any, read: Callable | None, text: str):
    """A value and its flag: `read` makes it of the flag's text, or says what is wrong."""
    return field(default=default, metadata={"read": read, "help": text})


@dataclass(frozen=True)
class BothPreset:
    image_size: int = option(32, number(int, 2, 2**16), "side of the images")
    muon: bool = option(
        True, YES_OR_NO, "Muon instead of AdamW for the matrices and convolutions inside layers")
    warmup: int = option(30, STEPS, "steps of linear warm-up, in both stages")
    final_lr: float = option(0.0, PART, "learning rate at the end, as a share of the peak")


@dataclass(frozen=True)
class TokenizerPreset(BothPreset):
    scales: tuple[int, ...] = option(
        (1, 2, 3, 5, 8), several(SIZE),
        "sides of the token maps, with commas, from 1 to the latent's; unless given, 1,2,4,... "
        "where the default does not fit it")
    vocabulary: int = option(256, SIZE, "codes in the codebook")
    code_channels: int = option(8, SIZE, "channels of a code")
    tokenizer_width: int = option(16, SIZE, "the tokenizer's channels at full resolution")
    multipliers: tuple[int, ...] = option(
        (1, 2, 4), several(SIZE),
        "of that width, per resolution, with commas; each but the first halves the side")
    blocks: int = option(1, SIZE, "residual blocks per resolution")
    phis: int = option(4, SIZE, "distinct phi convolutions")
    norm_groups: int = option(2, SIZE, "groups of the tokenizer's group norms")
    tokenizer_steps: int = option(1200, COUNT, "train steps of the tokenizer")
    tokenizer_batch: int = option(8, SIZE, "images per train step of the tokenizer")
    tokenizer_lr: float = option(1.5e-3, RATE, "peak learning rate of the tokenizer")
    unquantized: float = option(
        0.1, BELOW_1, "share of the tokenizer's steps, at first, without quantization")
    edge_weight: float = option(
        3.0, WEIGHT, "weight, in the tokenizer's loss, of how much less steep edges are than they "
        "should be, or more")
    smaller_weight: float = option(
        0.5, WEIGHT, "weight, in the tokenizer's loss, of smaller images, which latents averaged "
        "down should be of")
    perceptual_weight: float = option(
        0.0, WEIGHT, "weight of the perceptual distance in the tokenizer's loss; 0 is without")
    adversarial_weight: float = option(
        0.0, WEIGHT, "weight of the discriminator against all else, as it pulls at the decoder's "
        "last layer; 0 is without")
    adversarial_from: float = option(
        0.3, BELOW_1, "share of the tokenizer's steps, at first, without the discriminator")
    discriminator_width: int = option(32, SIZE, "the discriminator's channels at half resolution")
    discriminator_lr: float = option(2e-4, RATE, "peak learning rate of the discriminator")


@dataclass(frozen=True)
class VARPreset(BothPreset):
    depth: int = option(6, SIZE, "layers of the transformer")
    width: int = option(64, SIZE, "width of the transformer")
    heads: int = option(4, SIZE, "attention heads")
    shared_adaln: bool = option(False, YES_OR_NO, "one AdaLN modulation shared by all layers")
    normalise_qk: bool = option(True, YES_OR_NO, "unit queries and keys with a learned scale")
    label_dropout: float = option(0.1, PART, "share of train labels that become the null class")
    drop_path: float = option(0.0, BELOW_1, "stochastic depth of the last layer; of the first, 0")
    last_scales: int | None = option(
        None, COUNT, "how many scales a token sees, its own among them (default: all so far)")
    var_steps: int = option(2700, COUNT, "train steps of the transformer")
    var_batch: int = option(16, SIZE, "images per train step of the transformer")
    var_lr: float = option(1.5e-2, RATE, "peak learning rate of the transformer")
    weight_decay: float = option(0.05, WEIGHT, "of the transformer's matrices")
    ema: float = option(0.95, BELOW_1, "decay of the running average of the transformer's weights")


@dataclass(frozen=True)
class Preset(VARPreset, TokenizerPreset):
    """All the values of a training, and what its samples are drawn with instead of sample.py's
    defaults, which were chosen on shapes."""
    cfg: float | None = option(None, GUIDANCE, "guidance of samples (default: sample.py's)")
    growth: float | None = option(None, GROWTH, "its growth over the scales (default: likewise)")
    smooth: float | None = option(None, PART, "smoothness of samples (default: likewise)")

    def drawing(self) -> dict[str, float]:
        """Those of the last three that are not sample.py's."""
        values = dict(cfg=self.cfg, growth=self.growth, smooth=self.smooth)
        return {name: value for name, value in values.items() if value is not None}

    def of(self, stage: type[BothPreset]) -> dict[str, Any]:
        """Those that a stage is made with."""
        return {value.name: getattr(self, value.name) for value in fields(stage)}

    def tokenizer_shape(self, image_channels: int) -> dict[str, Any]:
        """What a TokenizerConfig takes."""
        names = ("scales", "vocabulary", "code_channels", "multipliers", "blocks", "phis",
                 "norm_groups")
        shape = {name: getattr(self, name) for name in names}
        return {**shape, "image_channels": image_channels, "width": self.tokenizer_width}

    def var_shape(self, classes: int) -> dict[str, Any]:
        """What a VARConfig takes."""
        names = ("scales", "vocabulary", "code_channels", "depth", "width", "heads",
                 "shared_adaln", "normalise_qk", "label_dropout", "drop_path", "last_scales")
        return {**{name: getattr(self, name) for name in names}, "classes": classes}

    def of_tokenizer(self, shape: dict[str, Any], image_size: int, given: dict) -> Preset:
        """The same with the shape of a tokenizer that is there, as `tokenizer_shape` has it.
        Raises UserError for `given` flags that say otherwise."""
        shape = {**shape, "image_size": image_size, "tokenizer_width": shape["width"]}
        own = {name: shape[name] for name in self.of(TokenizerPreset) if name in shape}
        if "image_size" not in given and image_size != self.image_size:
            say(f"note: images are of side {image_size}, as the tokenizer's are")
        for name, value in {**own, "channels": shape["image_channels"]}.items():
            if given.get(name) not in (None, value):
                raise UserError(f"--{name.replace('_', '-')} {given[name]} is not that of the "
                                f"tokenizer, which has {value}")
        return replace(self, **own)


VALUES = {"tokenizer": TokenizerPreset, "var": VARPreset}   # of each stage
KINDS = {"tokenizer": "tokenizer", "var": "transformer"}    # of its checkpoint

PRESETS = {
    "tiny": Preset(),
    # MNIST and its kin at their own size, in the minutes that the default takes.
    "pixels28": Preset(
        image_size=28, scales=(1, 2, 3, 5, 7), perceptual_weight=1.0, adversarial_weight=0.5,
        adversarial_from=0.2, discriminator_width=16, tokenizer_steps=900, var_steps=2650,
        cfg=2.0, growth=8.0, smooth=0.0),
    "cifar": Preset(
        edge_weight=0.0, smaller_weight=0.0, scales=(1, 2, 3, 4, 6, 8), vocabulary=1024,
        code_channels=32, tokenizer_width=96, multipliers=(1, 2, 2), blocks=2, norm_groups=32,
        tokenizer_steps=20_000, tokenizer_batch=256, tokenizer_lr=4e-4, depth=12, width=768,
        heads=12, drop_path=0.05, var_steps=40_000, var_batch=256, var_lr=3e-4, muon=False,
        final_lr=0.05, warmup=1000, ema=0.9995),
    # Thousands of images, a folder of one's own say. Of one CPU core without AVX-512 the
    # tokenizer takes 19 minutes, and the transformer 61.
    "pixels64": Preset(
        image_size=64, edge_weight=0.0, scales=(1, 2, 3, 4, 6, 8), vocabulary=512,
        code_channels=16, multipliers=(1, 2, 4, 8), tokenizer_steps=1750, tokenizer_lr=1e-3,
        perceptual_weight=0.1, adversarial_weight=0.1, depth=6, width=256, var_steps=1550,
        var_batch=32, var_lr=7e-3, warmup=100, ema=0.99),
    # The published d16 geometry, and its recipe: 200 epochs of ImageNet in batches of 768.
    "imagenet256": Preset(
        image_size=256, edge_weight=0.0, smaller_weight=0.0,
        scales=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16), vocabulary=4096, code_channels=32,
        tokenizer_width=160, multipliers=(1, 1, 2, 2, 4), blocks=2, norm_groups=32,
        tokenizer_steps=400_000, tokenizer_batch=128, tokenizer_lr=1e-4, perceptual_weight=1.0,
        adversarial_weight=0.4, discriminator_width=64, depth=16, width=1024, heads=16,
        drop_path=0.1 * 16 / 24, var_steps=333_000, var_batch=768, var_lr=3e-4, muon=False,
        final_lr=0.1, warmup=6000, ema=0.9999),
}


def drawing_of(path: Path) -> dict[str, float]:
    """What the samples of a training of ours are drawn with instead of sample.py's defaults. Reads
    no weights, and of a file that cannot be read nothing: who loads it says what is wrong."""
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        return Preset(**content["preset"]).drawing()
    except Exception:
        return {}


DESCRIPTION = """Train VAR: the tokenizer, then the transformer.

    python train.py                                     the built-in shapes, minutes on two cores
    python train.py --data fashion-mnist --preset pixels28
    python train.py --data FOLDER --image-size 64       a sub-folder of images for each class
    python train.py --data FOLDER --preset pixels64     with the losses that keep detail
    python train.py --resume                            after Ctrl-C
    python train.py --tokenizer-steps 200 --var-steps 100 --out out/look    a quick look"""
TURNED = ("image_size", "tokenizer_steps", "var_steps")   # the values that most trainings change


def training_flags() -> Parser:
    """The flags of train.py."""
    parser = Parser(usage="python train.py [FLAGS]", description=DESCRIPTION,
                    formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument_group("what, where and how long").add_argument
    add("--data", default="shapes",
        help=f"shapes (drawn), {', '.join(PUBLISHED)}, or a folder with a sub-folder of images for "
             f"each class (default: %(default)s)")
    add("--out", type=place, help="folder to write to (default: out/ and the name of the data)")
    add("--resume", action="store_true",
        help="go on from the checkpoints in the folder (default: begin)")
    add("--preset", choices=PRESETS, default="tiny",
        help="a size of model and training; other flags change single values of it (default: "
             "%(default)s)")
    for name in TURNED:
        add_value(add, name)
    add("--stage", choices=("all", "tokenizer", "var"), default="all",
        help="what to train (default: %(default)s)")
    add("--tokenizer", type=place,
        help="train the transformer on this tokenizer, a .pt of train.py or a published .pth; the "
             "run keeps a copy (default: the one that is trained first)")
    add("--seed", type=SEED, default=0, help="of every random draw (default: %(default)s)")
    add("--tensorboard", action="store_true",
        help="write numbers and pictures for TensorBoard, too, into the run's folder (default: "
             "do not)")
    group = parser.add_argument_group("the machine")
    add_device_flags(group)
    add = group.add_argument
    add("--grad-accumulation", type=COUNT, default=1, metavar="N",
        help="compute a step in this many micro-batches, to need less memory (default: "
             "%(default)s)")
    add("--checkpoint-activations", action="store_true",
        help="keep only what enters a layer for the backward pass and compute the rest again: less "
             "memory, more time (default: keep all)")
    add("--checkpoint-every", type=COUNT, default=1000,
        help="steps between checkpoints (default: %(default)s)")
    add("--workers", type=STEPS, default=min(8, own_cores()),
        help="threads that read the images of a folder (default: %(default)s)")
    add = parser.add_argument_group("images").add_argument
    add("--data-dir", type=place, default=Path("data"),
        help="where published data sets are looked for, and downloaded to (default: %(default)s)")
    add("--channels", type=int, choices=(1, 3),
        help="3 for colour or 1 for grey, of images in a folder (default: 3)")
    add("--white-level", type=number(int, 1, 65535), metavar="N",
        help="the white of grey 16-bit files that use fewer bits, as 4095 for 12 (default: 65535, "
             "or a given tokenizer's)")
    add("--stream", action="store_true",
        help="read a folder's images as training goes (default: decode them once)")
    add("--perceptual", type=place, metavar="FILE",
        help="LPIPS as the perceptual distance, by torchvision's VGG-16 (vgg16-397923af.pth), "
             "downloaded if it is not there (default: that of a classifier of the same images)")
    add = parser.add_argument_group(
        "other values of the preset (the defaults shown are those of tiny)").add_argument
    for value in fields(Preset):
        if value.name not in TURNED:
            add_value(add, value.name)
    return parser


def add_value(add: Callable, name: str) -> None:
    """The flag of a value of the preset; one that is not given stays unset."""
    value = Preset.__dataclass_fields__[name]
    text = value.metadata["help"]
    if value.default is not None:
        default = value.default
        if isinstance(default, tuple):
            default = ",".join(map(str, default))
        text += f" (default: {default})"
    how = {"type": value.metadata["read"], "metavar": "N"}
    if how["type"] is YES_OR_NO:
        how = {"action": BooleanOptionalAction}
    add("--" + name.replace("_", "-"), **how, default=SUPPRESS, help=text)


def training_options(arguments: list[str] | None = None) -> Namespace:
    """What is asked for, with `stages`, those to train. Raises UserError for flags of which one
    makes another useless, and for a folder not to train in."""
    options = training_flags().parse_args(arguments)
    preset = replace(PRESETS[options.preset], **given_values(options))
    if not options.data:
        raise UserError("--data: a name is missing")
    if options.tokenizer and options.stage == "tokenizer":
        raise UserError("--stage tokenizer trains a tokenizer; --tokenizer names a finished one")
    options.stages = ["tokenizer", "var"] if options.stage == "all" else [options.stage]
    if options.tokenizer:
        options.stages = ["var"]
    if options.perceptual and not ("tokenizer" in options.stages and preset.perceptual_weight):
        raise UserError("--perceptual changes nothing without --perceptual-weight, or where no "
                        "tokenizer is trained")
    options.out = options.out or Path("out") / Path(options.data).resolve().name
    check_folder(options.data, options.out, options.stages, options.resume)
    options.tensorboard = summary_writer() if options.tensorboard else None
    return options


def given_values(options: Namespace) -> dict[str, Any]:
    """The values of the preset that were named on the command line."""
    return {name: value for name, value in vars(options).items()
            if name in Preset.__dataclass_fields__}


def chosen_preset(options: Namespace) -> Preset:
    """The preset with the values that were given instead of its own; scales that were not given
    follow from the side of the latent, where the preset's do not fit it."""
    given = given_values(options)
    preset = replace(PRESETS[options.preset], **given)
    downsampling = 2 ** (len(preset.multipliers) - 1)
    side = preset.image_size // downsampling   # of the latent
    if "scales" not in given and preset.scales[-1] != side:
        doubling = [2**k for k in range(side.bit_length()) if 2**k < side]
        preset = replace(preset, scales=(*doubling, max(1, side)))
        fits = side * downsampling == preset.image_size   # else `check_sizes` refuses it
        trained = not options.tokenizer and options.stage != "var"   # else it has its own
        if trained and fits and given.keys() & {"image_size", "multipliers"}:
            say(f"images of side {preset.image_size} are tokenised at scales "
                f"{','.join(map(str, preset.scales))}")
    return preset


def check_sizes(preset: Preset, stages: list[str], micro_batches: int) -> None:
    """Raises UserError for sizes that do not fit each other. micro_batches: of all processes."""
    downsampling = 2 ** (len(preset.multipliers) - 1)
    side = preset.scales[-1] * downsampling
    if side != preset.image_size:
        raise UserError(f"--image-size {preset.image_size} does not fit: scales up to "
                        f"{preset.scales[-1]} at downsampling {downsampling} are images of {side}")
    if "tokenizer" in stages and preset.adversarial_weight and preset.image_size < 8:
        raise UserError("--adversarial-weight is for images of side 8 and more: the discriminator "
                        "halves them three times")
    for name in stages:
        batch = getattr(preset, f"{name}_batch")
        if batch % micro_batches:
            raise UserError(f"--{name}-batch {batch} does not divide into {micro_batches} "
                            f"micro-batches, of so many processes times --grad-accumulation")


def white_level(options: Namespace) -> int | None:
    """What is white in grey files of 16 bits: as told, else as in the training that goes on, else
    as in that of the tokenizer that is there."""
    first = options.stages[0]
    tokenizer = options.tokenizer or options.out / "tokenizer.pt"
    for path, kind in ((options.out / f"{first}.pt", KINDS[first]), (tokenizer, "tokenizer")):
        if not options.white_level and path.suffix == ".pt" and path.exists():
            return load_checkpoint(path, kind).get("white")
    return options.white_level


def check_begun(options: Namespace, preset: Preset) -> None:
    """Raises UserError where a training that is to go on began with other values: before the data
    is read, which for other values would be decoded anew."""
    for name in options.stages:
        path = options.out / f"{name}.pt"
        if not path.exists():
            continue
        with blaming(path):
            content = load_checkpoint(path, KINDS[name])
            white = content.get("white") or 65535
            channels = content["config"].get("image_channels", options.channels)
            begun = {**content["made_with"], "white_level": white, "channels": channels}
            now = {**preset.of(VALUES[name]), "seed": options.seed,
                   "white_level": options.white_level or white,
                   "channels": options.channels or channels}
            check_made_with(path, {"made_with": begun}, now)


def check_folder(data: str, out: Path, stages: list[str], resume: bool) -> None:
    """Raises UserError for a folder with a training in it, and for one inside the data."""
    folder = Path(data).resolve()
    if data not in ("shapes", *PUBLISHED) and out.resolve().is_relative_to(folder):
        raise UserError(f"--out {out} lies in --data {data}, and its pictures would be taken for "
                        f"data; name a folder elsewhere")
    nearest = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise UserError(f"--out {out} cannot be a folder, as {nearest} is a file")
    there = [path for path in (out / f"{name}.pt" for name in stages) if path.exists()]
    if there and not resume:
        raise UserError(f"{there[0]} is there already: --resume goes on with it, --out names "
                        f"another folder")
    if resume and not there:
        names = " or ".join(f"{name}.pt" for name in stages)
        print(f"note: there is no {names} in {out} to go on from")
