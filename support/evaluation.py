"""How good a tokenizer is, and how good generated images are.

No image is the right answer to "draw a star", so sets of images are compared: generated ones with
held-out ones of the same classes. A small classifier, trained on the run's own images, looks at
them: the class it takes an image for is compared, and the features from which it concludes it.

How far apart two sets seem depends on how many images they hold, so equally many are compared. And
held-out images are compared with themselves, half with half, which is as near as other images can
be expected to come. (Reconstructions are compared with their own originals, and may come nearer.)
Read `Quality`, then `evaluate`.
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.checkpoint import blaming, load_checkpoint, save_checkpoint
from support.cli import UserError
from support.devices import progress_bar, say
from support.images import at_a_time, to_float

# -------------------------------------------------------------------------------------------------
# The tokenizer


def psnr(mse: float) -> float:
    """Peak signal-to-noise ratio in dB, of a mean squared error between images in [-1, 1]."""
    return 10 * math.log10(4 / max(mse, 1e-10))


@torch.no_grad()
def tokenizer_health(tokenizer: nn.Module, batches: Iterable[Tensor]) -> dict:
    """Is the codebook alive? A list over the scales for each of these, and one number:

        psnr_per_scale         dB, of the images decoded from the scales up to this one
        codes_per_scale        how many codes the scale uses
        usage_per_scale        the same as a share of what it could use, min(V, its tokens)
        perplexity_per_scale   exp(entropy) of its codes: how many, if all were used alike
        codes_used             share of the codebook that is used by any scale
    """
    quantizer = tokenizer.quantizer
    V = tokenizer.config.vocabulary
    counts_KV = torch.zeros(len(tokenizer.config.scales), V)
    errors_K = [0.0] * len(counts_KV)
    pixels = 0
    for images in batches:
        pixels += images.numel()
        f_hat_BCSS = quantizer.initial(len(images))
        for k, tokens_Bl in enumerate(quantizer.split(tokenizer.encode(images))):
            f_hat_BCSS = quantizer.accumulate(f_hat_BCSS, tokens_Bl, k)
            so_far = tokenizer.render(f_hat_BCSS).clamp(-1, 1)
            errors_K[k] += F.mse_loss(so_far, images, reduction="sum").item()
            counts_KV[k] += tokens_Bl.flatten().bincount(minlength=V).cpu()
    codes_K = (counts_KV > 0).sum(dim=1)
    tokens_K1 = counts_KV.sum(dim=1, keepdim=True)
    entropy_K = torch.special.entr(counts_KV / tokens_K1).sum(dim=1)
    return {
        "psnr_per_scale": [psnr(error / pixels) for error in errors_K],
        "codes_per_scale": codes_K.tolist(),
        "usage_per_scale": (codes_K / tokens_K1.flatten().clamp(max=V)).tolist(),
        "perplexity_per_scale": entropy_K.exp().tolist(),
        "codes_used": counts_KV.any(dim=0).double().mean().item(),
    }


def say_health(health: dict, config) -> None:
    """Say it as a table. config: the tokenizer's."""
    used = f"{health['codes_used']:.0%} of {config.vocabulary} codes used"
    say(f"held-out images: PSNR {health['psnr_per_scale'][-1]:.2f} dB; {used}")
    say("  scale   codes  usage  perplexity  PSNR up to here")
    columns = [health[f"{name}_per_scale"] for name in ("codes", "usage", "perplexity", "psnr")]
    for s, codes, usage, perplexity, decibels in zip(config.scales, *columns):
        say(f"  {s:>2}x{s:<3} {codes:>6} {usage:>6.0%} {perplexity:>11.1f} {decibels:>13.2f} dB")


# -------------------------------------------------------------------------------------------------
# The classifier

JUDGED_SIDE = 64              # it sees larger images averaged down to this side
CLASSIFIER_IMAGES = 20_000    # train.py keeps at most so many for its training
CLASSIFIER_STEPS = 800
CLASSIFIER_BATCH = 64


class Classifier(nn.Module):
    """A network that knows a run's images, for a perceptual distance and for `Judge`.

    Four convolutions; the last one's map, averaged over places and normalised, is the features. It
    is small, to be trained within half a minute on two cores.
    """

    def __init__(self, channels: int, side: int, classes: int):
        """side: of the images before they are averaged down."""
        super().__init__()
        widths = (channels, 32, 64, 128, 128)
        strides = (1 if side <= JUDGED_SIDE // 2 else 2, 2, 2, 2)
        self.levels = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False),
                          nn.BatchNorm2d(width), nn.ReLU())
            for width_in, width, stride in zip(widths, widths[1:], strides))
        self.normalise = nn.BatchNorm1d(widths[-1], affine=False)   # to mean 0 and variance 1
        self.head = nn.Linear(widths[-1], classes)

    def maps(self, images: Tensor) -> list[Tensor]:
        """What every level makes of images [B, channels, side, side], of any side."""
        maps = []
        for level in self.levels:
            images = level(images)
            maps.append(images)
        return maps

    def features(self, images: Tensor) -> Tensor:
        """[B, D]."""
        last_BDss = self.maps(averaged_down(images))[-1]
        return self.normalise(last_BDss.mean(dim=(2, 3)))

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes]."""
        return self.head(self.features(images))


def averaged_down(images: Tensor) -> Tensor:
    """Float images as the classifier sees them: their side is JUDGED_SIDE at most.

    On the CPU, since Apple's GPU averages only over areas that divide the side.
    """
    if images.shape[-1] <= JUDGED_SIDE:
        return images
    small = F.interpolate(images.cpu(), size=(JUDGED_SIDE, JUDGED_SIDE), mode="area")
    return small.to(images.device)


@torch.no_grad()
def features_and_classes(classifier: Classifier, images: Tensor) -> tuple[np.ndarray, Tensor]:
    """Features, float64 [N, D], and the classes [N] that images are taken for.

    images: on the CPU, bytes or in [-1, 1].
    """
    features = []
    taken_for = []
    for some in images.split(at_a_time(images.shape[-1])):
        some = some if some.is_floating_point() else to_float(some)
        features_BD = classifier.features(some.to(classifier.head.weight.device))
        features.append(features_BD.cpu().double())
        taken_for.append(classifier.head(features_BD).argmax(dim=1).cpu())
    return torch.cat(features).numpy(), torch.cat(taken_for)


@torch.enable_grad()   # whoever judges may be under no_grad
def train_classifier(
    images: Tensor, labels: Tensor, shape: dict[str, int], seed: int, device: torch.device
) -> Classifier:
    """Train one. images: bytes [N, channels, side, side]; shape: what `Classifier` takes."""
    torch.manual_seed(seed)
    classifier = Classifier(**shape).to(device)
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, CLASSIFIER_STEPS)
    for _ in progress_bar(range(CLASSIFIER_STEPS), desc="classifier", unit="step"):
        rows = torch.randint(len(images), (CLASSIFIER_BATCH,))
        logits = classifier(to_float(images[rows].to(device)))
        loss = F.cross_entropy(logits, labels[rows].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return classifier.eval().requires_grad_(False)


def kept_classifier(run) -> Classifier:
    """The classifier in a run's folder; trained first, on the images that train.py kept, where
    there is none, or one of other images. run: a sample.Run. Raises UserError for a single class.
    """
    classes = len(run.classes)
    if classes == 1:
        raise UserError("images are judged by a classifier, to which one class gives nothing to "
                        "learn")
    device = run.machine.device
    images_path = run.folder / "train_images.pt"
    if not images_path.exists():
        raise UserError(f"there is no {images_path}, by which images are judged: train.py writes "
                        f"it at its end, to which --resume leads")
    with blaming(images_path):
        content = load_checkpoint(images_path, "set of training images")
        images = content["images"]
        labels = content["labels"]
        data_set = content["data_set"]
        shape = {"channels": images.shape[1], "side": content["side"], "classes": classes}
        if run.data_set not in (None, data_set):
            raise UserError(f"{images_path} is of other images than the transformer was trained "
                            f"on; train.py --stage var --resume, with its --data, writes it anew")
    path = run.folder / "classifier.pt"
    if path.exists():
        with blaming(path):
            kept = load_checkpoint(path, "classifier")
            if kept["data_set"] == data_set:
                classifier = Classifier(**kept["shape"])
                classifier.load_state_dict(kept["model"])
                return classifier.eval().requires_grad_(False).to(device)
        print(f"{path} was trained on other images: another is trained")
    classifier = train_classifier(images, labels, shape, 0, device)
    try:
        save_checkpoint(path, "classifier", shape=shape, model=classifier.state_dict(),
                        data_set=data_set)
    except UserError as error:   # it serves all the same
        print(f"the classifier is not kept: {error}")
    return classifier


# -------------------------------------------------------------------------------------------------
# Sets of images


@dataclass
class Quality:
    """What is measured of a set of images.

    recognised   share that the classifier takes for the class they should be of
    per_class    the same of each class's images, by its name
    frechet      Fréchet distance, squared, of the features to those of held-out images: how far two
                 clouds of points lie apart, in place and in spread. 1 is a shift by one standard
                 deviation of one feature.
    precision    share of the images whose features lie among those of held-out images: fidelity
    recall       share of held-out images whose features lie among those of the images: variety.
                 Guidance and filters buy precision with recall.
    detail       power of high spatial frequencies, as a share of the held-out images': less than 1
                 is blur
    """
    recognised: float
    per_class: dict[str, float]
    frechet: float
    precision: float
    recall: float
    detail: float


@dataclass
class Evaluation:
    accuracy: float               # share of all held-out images that the classifier recognises
    originals: Quality            # of one half of the held-out images against the other: a ceiling
    reconstructions: Quality      # of the held-out images, against themselves
    psnr: float                   # of the reconstructions, in dB
    nats_per_image: float         # -log p(tokens | class) of the held-out images: exact, and
    nats_per_token: float         # without guidance
    generated: list[Quality]      # for each seed, with guidance, filters and smoothing of the run
    unfiltered: list[Quality]     # for each seed, without any


def evaluate(run, count: int, seeds: Sequence[int]) -> Evaluation:
    """Judge `count` held-out images, their reconstructions and, for each seed, as many generated
    images of the same classes. run: a sample.Run. Raises UserError.
    """
    originals, labels = evaluated_images(run, count)
    judge = Judge(kept_classifier(run), originals, run.classes)
    all_images, all_labels_N = run.held_out.tensors
    _, taken_for_N = features_and_classes(judge.classifier, all_images)
    # The judge holds even rows against even ones. So, with neighbours swapped, it holds odd
    # originals against even ones: one half against the other.
    other_half = torch.arange(count) ^ 1
    _, tokens_NL = run.encode(originals)
    reconstructions = run.decode(tokens_NL)
    nats = -run.log_likelihood(tokens_NL, labels.tolist()).mean().item()

    def generated(run) -> list[Quality]:
        drawn = (run.draw(labels.tolist(), seed)[1] for seed in seeds)
        return [judge(run.decode(drawn_N), labels) for drawn_N in drawn]

    # Without guidance and filters the model draws from its own distribution.
    unfiltered = replace(run.sampling, cfg=0.0, top_k=0, top_p=1.0, smooth=0.0)
    return Evaluation(
        accuracy=(taken_for_N == all_labels_N).double().mean().item(),
        originals=judge(originals[other_half], labels[other_half]),
        reconstructions=judge(reconstructions, labels),
        psnr=psnr(F.mse_loss(reconstructions, originals).item()),
        nats_per_image=nats,
        nats_per_token=nats / tokens_NL.shape[1],
        generated=generated(run),
        unfiltered=generated(replace(run, sampling=unfiltered)),
    )


def evaluated_images(run, count: int) -> tuple[Tensor, Tensor]:
    """`count` held-out images, drawn at random, and their labels, by which they are ordered: so the
    even and the odd rows are two halves that hold the same classes. run: a sample.Run.
    """
    total = len(run.held_out_images())
    if count > total:
        raise UserError(f"{count} images cannot be judged: there are {total} held-out images")
    if count % 2:
        raise UserError(f"{count} images cannot be judged: two halves are compared, so it takes an "
                        f"even number")
    order_N = torch.randperm(total, generator=torch.Generator().manual_seed(0))
    images, labels_N = run.held_out[order_N[:count]]
    labels_N, by_label_N = labels_N.sort(stable=True)
    return to_float(images[by_label_N]), labels_N


class Judge:
    """Measures the quality of images against held-out ones, `originals`.

    Even rows are compared with even rows and odd ones with odd ones; the figure is the mean.
    """

    def __init__(self, classifier: Classifier, originals: Tensor, classes: list[str]):
        self.classifier = classifier
        self.classes = classes
        self.features_ND = features_and_classes(classifier, originals)[0]
        self.power = fine_power(originals)

    def __call__(self, images: Tensor, labels: Tensor) -> Quality:
        """images: in the originals' order, [N, channels, side, side]; labels: [N]."""
        if not images.isfinite().all():
            raise UserError("the images to judge hold numbers that are not finite: the model that "
                            "made them is broken")
        features_ND, taken_for_N = features_and_classes(self.classifier, images)
        hit_N = (taken_for_N == labels).double()
        per_class = {self.classes[label]: hit_N[labels == label].mean().item()
                     for label in labels.unique().tolist()}
        halves = [(features_ND[i::2], self.features_ND[i::2]) for i in (0, 1)]
        measured = [(frechet_distance(made_ND, real_ND), share_among(made_ND, real_ND),
                     share_among(real_ND, made_ND)) for made_ND, real_ND in halves]
        frechet, precision, recall = np.mean(measured, axis=0).tolist()
        return Quality(
            recognised=hit_N.mean().item(),
            per_class=per_class,
            frechet=frechet,
            precision=precision,
            recall=recall,
            detail=fine_power(images) / self.power if self.power > 1e-12 else math.nan,
        )


def frechet_distance(a_ND: np.ndarray, b_MD: np.ndarray) -> float:
    """Squared Fréchet distance of two sets of vectors, each taken for a Gaussian (1706.08500).

        |mean_a - mean_b|^2 + Tr(S_a + S_b - 2 (S_a S_b)^(1/2))        S: the covariances

    With S_a = A^T A and S_b = B^T B the trace of the root is the sum of A B^T's singular values.
    """
    between_D = a_ND.mean(axis=0) - b_MD.mean(axis=0)
    A_DD, B_DD = (np.linalg.qr((x - x.mean(axis=0)) / math.sqrt(len(x) - 1), mode="r")
                  for x in (a_ND, b_MD))
    shared = np.linalg.norm(A_DD @ B_DD.T, "nuc")
    return float(between_D @ between_D + (A_DD**2).sum() + (B_DD**2).sum() - 2 * shared)


NEIGHBOURS = 3   # as in the paper


def share_among(a_ND: np.ndarray, b_MD: np.ndarray) -> float:
    """Which share of the vectors a is as near to any vector of b as that one's third neighbour in b
    is (1904.06991, Eq. 1)."""
    # Not by a matrix product: exactly 0 from a vector to itself.
    distances = partial(torch.cdist, compute_mode="donot_use_mm_for_euclid_dist")
    a = torch.from_numpy(a_ND)
    b = torch.from_numpy(b_MD)
    reach_M = distances(b, b).kthvalue(NEIGHBOURS + 1).values   # the nearest is the vector itself
    return (distances(a, b) <= reach_M).any(dim=1).double().mean().item()


def fine_power(images: Tensor) -> float:
    """Mean power of spatial frequencies above a quarter of a cycle per pixel, half of the highest.

    The images fade to grey at the border, where the Fourier transform would find an edge: for it
    the left border is next to the right one.
    """
    side = images.shape[-1]
    cycles = torch.fft.fftfreq(side)
    fine_HW = torch.hypot(cycles[:, None], cycles) > 0.25
    fade = torch.hann_window(side, periodic=False)
    fade_HW = fade.outer(fade)
    total = 0.0
    for some in images.split(at_a_time(side)):
        centred = some - some.mean(dim=(2, 3), keepdim=True)
        power = torch.fft.fft2(centred * fade_HW).abs().square()[..., fine_HW]
        total += power.sum(dtype=torch.float64).item()
    return total / images.numel()


# -------------------------------------------------------------------------------------------------
# Tables


def say_evaluation(found: Evaluation, count: int, seeds: Sequence[int], sampling) -> None:
    """Print it as two tables, of means over the seeds and their spread. sampling: the run's."""
    asked = (f"cfg {sampling.cfg:g}, top-k {sampling.top_k}, top-p {sampling.top_p}, "
             f"growth {sampling.growth:g}, smooth {sampling.smooth:g}")
    sets = {
        "held-out, half against half": [found.originals],
        "reconstructions": [found.reconstructions],
        f"generated, {asked}": found.generated,
        "generated, no guidance, no filters": found.unfiltered,
    }
    print(f"{count} images of each kind; the classifier recognises {found.accuracy:.1%} of all "
          f"held-out images")
    say_qualities(sets)
    print(f"PSNR of the reconstructions {found.psnr:.2f} dB; held-out images take "
          f"{found.nats_per_image:.2f} nats each, {found.nats_per_token:.3f} per token")
    say_classes(list(sets.values()))
    if count < 500:
        print(f"note: {count} images are few: below 500 the Fréchet distance is much too large, "
              f"and\nprecision and recall are too good; half against half shows how much")
    if len(seeds) > 1:
        print(f"± is the standard deviation over the seeds {' '.join(map(str, seeds))}")
    print("This Fréchet distance is not FID: its features are those of the run's own classifier,\n"
          "so it compares images of this run's data alone. For FID, which the field's programs\n"
          "measure, this writes the files, with --run and other flags as here:\n"
          "    python sample.py export 50000 samples.npz --reference reference.npz")


def say_qualities(sets: dict[str, list[Quality]]) -> None:
    """Print a row for each set of images."""
    table = {"": ("recognised", "Fréchet", "precision", "recall", "fine detail")}
    for name, qualities in sets.items():
        figures = [(100 * x.recognised, x.frechet, 100 * x.precision, 100 * x.recall, x.detail)
                   for x in qualities]
        recognised, frechet, *shares, detail = zip(*figures)
        table[name] = [in_words(recognised, 1, " %"), in_words(frechet, 2),
                       *(in_words(share, 1, " %") for share in shares), in_words(detail, 2)]
    say_table(table)


def say_classes(sets: list[list[Quality]]) -> None:
    """Print the share recognised of each of the twenty classes that, generated, are least so."""
    def recognised(name: str) -> list[float]:
        return [np.mean([x.per_class[name] for x in qualities]) for qualities in sets]

    table = {"recognised": ("held-out", "reconstructed", "generated", "unfiltered")}
    for name in sorted(sets[0][0].per_class, key=lambda name: recognised(name)[2])[:20]:
        table[f"  {name}"] = [f"{share:.1%}" for share in recognised(name)]
    say_table(table)


def say_table(rows: dict[str, Sequence[str]]) -> None:
    """Print rows of a name and its columns, the heads first."""
    first = max(map(len, rows))
    width = 3 + max(len(text) for columns in rows.values() for text in columns)
    for name, columns in rows.items():
        print(f"{name:{first}}" + "".join(f"{text:>{width}}" for text in columns))


def in_words(values: Sequence[float], digits: int, unit: str = "") -> str:
    """Their mean and, if they are several, their standard deviation."""
    mean = f"{np.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean + unit
    return f"{mean} ± {np.std(values, ddof=1):.{digits}f}{unit}"
