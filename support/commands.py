"""The commands of sample.py and their flags. Boilerplate."""
from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from support.cli import (
    COUNT, GROWTH, GUIDANCE, PART, SEED, SHARE, Parser, UserError, add_device_flags, number,
    output_as, place,
)
from support.presets import drawing_of
from support.published import FOLDER as PUBLISHED_FOLDER

COMMANDS = {
    "grid": "draw a row of images for each class; the command if none is named",
    "progress": "draw a row for each image: what it looks like after each scale, coarse to fine",
    "inpaint": "complete images: a box or what is painted in a mask is generated, the rest known",
    "outpaint": "complete images: what is outside the box is generated",
    "edit": "in-paint towards a class",
    "upscale": "complete images of which the coarse scales are known",
    "reconstruct": "encode images and decode them",
    "codes": "draw what each scale finds left over, its codes, and the image so far",
    "teaching": "draw what the transformer reads in training, above what it has to predict",
    "attention": "draw what a cell of the last scale attends to, in every layer",
    "explore": "write a page, to be opened in a browser, on which all this is looked into by touch",
    "evaluate": "print how good generated images are, and reconstructed and held-out ones",
    "export": "write samples for the field's evaluation programs",
}
CLASSES = "grid progress"
SMOOTHED = f"{CLASSES} evaluate export"
HOLES = "inpaint outpaint edit"
COMPLETED = f"{HOLES} upscale"
GENERATING = f"{CLASSES} explore {COMPLETED} evaluate export"
TOKENIZER_ALONE = ("reconstruct", "codes")   # which no transformer is needed for
EVERY = " ".join(COMMANDS)
SHOWN = f"{' '.join(TOKENIZER_ALONE)} teaching attention"


class CommandParser(Parser):
    """Flags of several values take what follows them: images must stand before."""

    def error(self, message: str):
        takes_images = any(action.dest == "images" for action in self._actions)
        if takes_images and message.startswith(("argument --seeds: ", "argument --top-p: ")):
            message += "; images are named before such flags"
        super().error(message)


class OneOrTwo(argparse.Action):
    """One number as it is, two as a tuple."""

    def __call__(self, parser, options, values, flag=None):
        if len(values) > 2:
            parser.error(f"{flag} takes one number, or two: these are {len(values)}")
        setattr(options, self.dest, values[0] if len(values) == 1 else tuple(values))


def source(text: str) -> str:
    """The type of an image: "" would be all below the current folder."""
    return str(place(text))


TOP_P = dict(
    type=SHARE, nargs="+", action=OneOrTwo, metavar="P", help="draw from the most likely tokens "
    "that hold this probability; two numbers are those of the first and last scale")
FLAGS = [   # the commands that have it, its name, and what argparse has to know
    (f"{COMPLETED} {SHOWN}", "images", dict(
        nargs="+", type=source, metavar="IMAGE", help="files, folders, or data:17 for a held-out "
        "image; teaching and attention are of the first")),
    ("evaluate", "count", dict(type=number(int, 8), help="images of each kind, an even number")),
    ("export", "count", dict(
        type=number(int, 1, 1_000_000), help="samples, balanced over the classes")),
    ("export", "file", dict(
        type=output_as(".npz"), help="where to write them, as ADM's program reads them")),
    ("export", "--reference", dict(
        type=output_as(".npz"), help="where to write the held-out images, too")),
    ("export", "--rejection", dict(
        type=SHARE, default=1.0, help="keep this share of what is drawn, the most likely; it takes "
        "--smooth 0, as tokens are what is likely")),
    (f"{CLASSES} explore", "--classes", dict(
        nargs="+", metavar="NAME", help="names of classes, or their numbers (a published model's "
        "names need torchvision); all, at most 20, if not given")),
    (CLASSES, "--per-class", dict(
        type=number(int, 1, 1000), default=8, help="images per class; export writes more")),
    ("progress", "--gif", dict(type=output_as(".gif"), help="where to write a film of them, too")),
    (f"{COMPLETED} attention", "--class", dict(
        dest="class_name", metavar="NAME", help="what the images are to show; no class if not "
        "given, and for attention the image's own")),
    (HOLES, "--box", dict(
        nargs=4, type=PART, default=(0.25, 0.25, 0.75, 0.75),
        metavar=("Y0", "X0", "Y1", "X1"), help="what is generated, and for outpaint what is "
        "known; in fractions of the side")),
    (HOLES, "--mask", dict(
        type=place, help="instead of a box, an image in which what is to be generated is painted: "
        "in white on black, or in any colour on a transparent layer")),
    (HOLES, "--particles", dict(
        type=number(int, 0, 2**16), help="choose each result from so many, drawn from the coarsest "
        "scale on, by how well they fit what is known (default: 32, and 0 for a published model, "
        "which takes long); 0: one, whose coarse scales are the border's")),
    (HOLES, "--judge", dict(
        action="store_true", help="print what evaluate prints, of completed held-out images")),
    (HOLES, "--paste", dict(action="store_true", help="put the known pixels over the results")),
    ("upscale", "--small", dict(
        type=COUNT, help="side to which images are averaged down at first; half if not given")),
    (COMPLETED, "--open-loop", dict(
        action="store_true", help="put the image's own tokens, as published, for comparison")),
    ("attention", "--cell", dict(
        nargs=2, type=number(int, 0), metavar=("Y", "X"), help="if not the middle")),
    (f"{COMPLETED} evaluate", "--seeds", dict(
        nargs="+", type=SEED, default=(0, 1, 2), metavar="SEED",
        help="one result, or one set of generated images, for each")),
    (f"{CLASSES} explore export", "--seed", dict(
        type=SEED, default=0, help="the same seed and --batch give the same images")),
    (GENERATING, "--cfg", dict(
        type=GUIDANCE, help="classifier-free guidance at the last scale; 0 is none")),
    (GENERATING, "--top-k", dict(
        type=number(int, 0), help="draw from the k most likely tokens; 0 is no limit")),
    (f"{CLASSES} explore {HOLES} evaluate export", "--top-p", TOP_P),
    # Where only the fine scales are drawn, results are to differ in them.
    ("upscale", "--top-p", {**TOP_P, "default": (1.0, 0.6)}),
    (GENERATING, "--growth", dict(
        type=GROWTH, help="guidance and smoothing grow, and top-p falls, over the "
        "scales with this power of k / (K - 1): 1 is evenly, as published; above, the coarser "
        "scales are left more to themselves")),
    (SMOOTHED, "--smooth", dict(
        type=PART, help="how far the finer scales go from the code that was drawn "
        "for a place to the mean of all codes by their probability: smoother edges, and less "
        "variety; at 1 the last map is such means alone, so no filter acts there; 0 is not at all, "
        "as for published figures")),
    (GENERATING, "--batch", dict(
        type=COUNT, help="images at a time; if not given as many as have a cache of 4 GB, at most "
        "100")),
    (f"{CLASSES} {COMPLETED} {SHOWN}", "--out", dict(
        type=output_as(".png"), help="the picture; if not given, named for the command, beside the "
        "transformer, or the tokenizer where it alone is looked at")),
    ("explore", "--out", dict(
        type=output_as(".html"),
        help="the page; if not given, explorer.html beside the transformer")),
    (f"{CLASSES} {COMPLETED} {SHOWN}", "--cell-size", dict(
        type=number(int, 8, 2048), help="side of an image in the picture, in pixels; if not given, "
        "as fits a screen")),
    (EVERY, "--run", dict(
        type=place, help="the folder that train.py wrote (default: out/shapes)")),
    (EVERY, "--tokenizer", dict(
        type=place, help="another than the run's: a .pt of train.py or a published .pth")),
    (EVERY, "--var", dict(
        type=place, help="another transformer, likewise, with the tokenizer beside it if any")),
    (EVERY, "--published", dict(
        choices=("d16", "d20", "d24", "d30", "d36"), help="instead of a run, the authors' models, "
        "downloaded to data/published: 1.2, 2.4, 4.1, 8.0, or 9.4 GB, and 0.4 for the tokenizer")),
]


def parse(defaults: dict[str, Any], arguments: list[str] | None = None,
          of_published: dict[str, Any] | None = None, unsmoothed: dict[str, Any] | None = None
          ) -> argparse.Namespace:
    """What is asked for. defaults: of the flags that say how tokens are drawn; of_published: those
    of them for published models; unsmoothed: for commands that have no --smooth."""
    of_published = of_published or defaults
    unsmoothed = unsmoothed or defaults
    arguments = sys.argv[1:] if arguments is None else arguments
    first = arguments[0] if arguments else "--"
    if first.startswith("-") and first not in ("-h", "--help"):
        arguments = ["grid", *arguments]
    parser = CommandParser(description="Draw with a trained VAR, and look into it.",
                           epilog="Each has its own flags: python sample.py grid --help")
    # For commands that are without these:
    parser.set_defaults(**dict.fromkeys(defaults), small=None, paste=False, particles=0,
                        judge=False, gif=None)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command, text in COMMANDS.items():
        ours = unsmoothed
        about = text.capitalize() + "."
        if command in SMOOTHED.split():
            ours = defaults
            about += " A run's preset may have other defaults of --cfg, --growth and --smooth."
        own = commands.add_parser(command, help=text, description=about)
        either = own.add_mutually_exclusive_group() if command in HOLES.split() else own
        for whose, name, how in FLAGS:
            if command in whose.split():
                value = name.removeprefix("--").replace("-", "_")
                told = with_default_told(how, ours.get(value), of_published.get(value))
                group = either if name in ("--box", "--mask") else own
                group.add_argument(name, **told)
        add_device_flags(own)
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        own = commands.choices[options.command]
        later = [word for word in unknown if word in COMMANDS]
        if later:
            own.error(f"the command comes first: python sample.py {later[0]}, then its images and "
                      f"flags")
        own.error(f"unrecognized arguments: {' '.join(unknown)}")
    if options.published and (options.run or options.tokenizer or options.var):
        raise UserError("--published names both models; --run, --tokenizer and --var name others")
    alone = options.command in TOKENIZER_ALONE and not options.var
    if alone and options.run and options.tokenizer:
        raise UserError(f"{options.command} looks at a tokenizer alone, and images beside it: name "
                        f"it by --run or by --tokenizer, not both")
    options.run = options.run or Path("out/shapes")
    if options.run.is_file():
        raise UserError(f"--run {options.run} is a file; the run is its folder, "
                        f"{options.run.parent}")
    check_outputs(options)
    if options.command == "edit" and options.class_name is None:
        raise UserError("edit needs --class NAME: what to edit towards")
    if "seeds" in options and len({*options.seeds}) < len(options.seeds):
        raise UserError("--seeds: one is named twice, and would give the same images again")
    theirs = options.published or options.var and options.var.suffix != ".pt"
    if options.particles is None:
        options.particles = 0 if theirs else 32
    ways = unsmoothed
    if theirs:
        ways = of_published
    elif options.command in SMOOTHED.split():
        ways = defaults | drawing_of(options.var or options.run / "var.pt")
    for name, value in ways.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.command == "export" and options.rejection < 1 and options.smooth:
        raise UserError("--rejection ranks images by their tokens, and smooth ones are made of "
                        "means, too: it takes --smooth 0")
    return options


def with_default_told(how: dict[str, Any], ours: Any, theirs: Any) -> dict[str, Any]:
    """What argparse has to know, the default in its help. A flag that has none of its own has
    `ours`, or `theirs` for published models: `parse` sets it once it knows which are meant."""
    default = how.get("default", ours)
    if default is None:
        return how
    told = as_typed(default)
    if "default" not in how and theirs != ours:
        told += f", and {as_typed(theirs)} for published models"
    return {**how, "help": f"{how['help']} (default: {told})"}


def as_typed(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def check_outputs(options: argparse.Namespace) -> None:
    """Raises UserError for two outputs of one name, for one that is read as well, and where the
    picture that is not given a name cannot be written: before anything is drawn."""
    folder = options.var.parent if options.var else options.run
    if options.published:
        folder = PUBLISHED_FOLDER
    if options.command in TOKENIZER_ALONE and options.tokenizer and not options.var:
        folder = options.tokenizer.parent
    own = folder / ("explorer.html" if options.command == "explore" else f"{options.command}.png")
    if "out" in options and not options.out and folder.is_dir():
        try:
            output_as(own.suffix)(str(own))
        except argparse.ArgumentTypeError as error:
            raise UserError(f"{error}; --out names another place")
    given = vars(options)
    written = (given.get("out") or own).resolve()
    for path in filter(None, [*given.get("images", ()), given.get("mask")]):
        read = Path(path).resolve()
        if read == written or written.exists() and read in written.parents:
            raise UserError(f"{written} would be written over, and is read; --out names another "
                            f"place")
    if options.command == "export" and options.reference:
        if options.reference.resolve() == options.file.resolve():
            raise UserError(f"{options.file.resolve()} is the name of two outputs")
