"""Files that are whole or not there, and that are read as they were written or not at all."""
from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickle
import socket
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from http.client import HTTPException
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from support.cli import UserError, in_short, lacks_memory
from support.devices import say


def save_whole(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write a file beside its place, then rename.

    At any instant, and when the disk is full, the old one or the new one is there.
    """
    path = path.resolve()   # a link stays one
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.partial")   # another program's is another
    try:
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())   # on the disk before it takes the name: a power cut may follow
        os.replace(beside, path)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)   # of a full disk there is none; else the one beside it
        raise


def save_checkpoint(path: Path, kind: str, **content) -> None:
    """Raises UserError where it cannot be written."""
    try:
        save_whole(path, lambda file: torch.save({"kind": kind, **content}, file))
    except (OSError, RuntimeError) as error:   # torch.save may end with the second after the first
        reason = error if isinstance(error, OSError) else error.__context__ or error
        as_before = ", and is what it was before" if path.exists() else ""
        raise UserError(f"{path} cannot be written{as_before}: {in_short(reason)}")


def load_checkpoint(path: Path, kind: str) -> dict:
    """A checkpoint of ours, on the CPU. Raises UserError where it is none, or of another kind."""
    content = read_tensors(path, f"{kind} checkpoint")
    found = content.get("kind") if isinstance(content, dict) else None
    if found is None:
        raise UserError(f"{path} is no {kind} checkpoint of train.py; a published one is read "
                        f"where its name ends in .pth")
    if found != kind:
        raise UserError(f"{path} is a checkpoint of a {found}, not of a {kind}")
    return content


def check_made_with(path: Path, content: dict, made_with: dict[str, Any]) -> None:
    """Raises UserError where what a checkpoint was made with is not what it would be now."""
    if "copied from" in content["made_with"]:
        raise UserError(f"{path} is a copy, and is not trained further; --resume --stage var goes "
                        f"on with the transformer")
    for name, now in made_with.items():
        before = content["made_with"].get(name)
        if before == now or name.endswith("_lr"):   # a learning rate may change
            continue
        told = f"--{name.replace('_', '-')} {before} and not {now}"
        if name == "LPIPS" or len(str(now)) == 64:   # a SHA-256 says nothing to anybody
            told = f"another {name}"
        if name == "data set":
            told += " (or of a folder other files, --stream, --channels or --white-level)"
        raise UserError(f"{path} was made with {told}, and goes on only as it began")


def load_if_same(path: Path, kind: str, made_with: dict[str, Any]) -> dict[str, Any] | None:
    """What a checkpoint holds that was made with the same; None, and a word, for any other."""
    if not path.exists():
        return None
    try:
        content = load_checkpoint(path, kind)
    except UserError as error:
        say(f"{error}: it is made anew")
        return None
    if made_with.items() <= content["made_with"].items():
        return content
    say(f"{path} is of other images, another tokenizer or precision: it is made anew")
    return None


def unfinished(content: dict, steps: str) -> str:
    """The step of a training that is not at its end, of how many; empty for one that is."""
    if "training" not in content:
        return ""
    done = f"step {content['training']['step']} of {content['preset'][steps]}"
    say(f"note: the training of the {content['kind']} is not finished: {done}")
    return f"{content['kind']}: {done}"


def read_tensors(path: Path, what: str) -> Any:
    """What torch.save or safetensors wrote, on the CPU; nothing in the file is run.

    PyTorch's reader compares no checksums, and where one bit says that an entry is a folder it
    returns memory that was never written. So Python's reader, which compares them, takes everything
    out, and PyTorch's gets a new archive of it. Raises UserError for anything else.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder; name the file in it, tokenizer.pt or var.pt say")
    if not path.is_file():
        raise UserError(f"there is no {what} at {path}")
    with blaming(path):
        with open(path, "rb") as file:
            start = file.read(16)
        if not start:
            raise UserError(f"{path} is empty")
        if path.suffix == ".safetensors":
            return read_safetensors(path)
        zipped = start.startswith(b"PK")
        if not zipped and not start.startswith(b"\x80"):   # as pickles do
            raise UserError(f"{path} is no checkpoint: it begins with {start!r}")
        source = verified(path) if zipped else path   # before PyTorch 1.6 it was no archive
        try:
            return torch.load(source, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            if "Unsupported" not in str(error):
                raise
            raise UserError(f"{path} holds more than tensors, a whole pickled module perhaps, and "
                            f"to load it would run its code; save its state_dict() instead")


def verified(path: Path) -> BinaryIO:
    """A new archive of the entries of an archive, which agree with their checksums."""
    copy = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copy, "w") as target:
        names = archive.namelist()
        if len(set(names)) < len(names):
            raise ValueError("an entry is there twice")
        for name in names:
            entry = zipfile.ZipInfo(name)   # of 1980: a clock may be wrong
            target.writestr(entry, archive.read(name))
    copy.seek(0)
    return copy


def read_safetensors(path: Path) -> dict:
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(f"{path} takes one more package to read: pip install safetensors")
    return load_file(path)


@contextlib.contextmanager
def blaming(path: Path) -> Iterator[None]:
    """What goes wrong inside is the file's fault: torch, zip, pickle and our own configs each raise
    their own."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if lacks_memory(error):
            raise
        raise UserError(f"{path} cannot be read, it is damaged or something else: "
                        f"{in_short(error)}")


def content_of(model: nn.Module) -> dict[str, Any]:
    """What a checkpoint keeps of a model, in the order in memory that other programs expect."""
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    return {"class": type(model).__name__, "config": asdict(model.config), "model": state}


def check_class(path: Path, content: dict, model: type[nn.Module]) -> None:
    """Raises UserError where a checkpoint is of another class, whose code computes something else,
    be it with the same weights."""
    found = content.get("class", model.__name__)
    if found != model.__name__:
        raise UserError(f"{path} is a checkpoint of the class {found} and not of {model.__name__}; "
                        f"the program that defines {found} opens it")


def restored(
    path: Path, kind: str, model: type[nn.Module], config: type
) -> tuple[nn.Module, dict[str, Any]]:
    """The model in a checkpoint of ours, and all else that is in it. Raises UserError."""
    with blaming(path):
        content = load_checkpoint(path, kind)
        check_class(path, content, model)
        found = model(config(**content["config"]))
        found.load_state_dict(content["model"])
        check_finite(content["model"])
        return found, content


def check_finite(state: dict[str, torch.Tensor]) -> None:
    """Raises ValueError for a weight that is no number: all that is drawn would be grey."""
    for name, weight in state.items():
        if not weight.isfinite().all():
            raise ValueError(f"{name} is not finite")


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of config and weights: a transformer names the tokenizer that it learned from."""
    digest = hashlib.sha256(repr(model.config).encode())
    for name, tensor in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def download(url: str, path: Path, sha256: str | None = None) -> None:
    """Fetch a file, with a progress bar; it is there when it is whole, and has the SHA-256 given.

    Raises UserError where the network does not have it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    socket.setdefaulttimeout(30)   # seconds without a byte
    try:
        torch.hub.download_url_to_file(url, str(path), sha256)
    except (OSError, HTTPException, RuntimeError) as error:   # the last for another SHA-256
        raise UserError(f"cannot download {url} ({error}); fetch it by other means, as {path}")
