"""A device that stands in for a GPU, where there is none:

    python tests/stand_in.py "train.py --out out/a" "sample.py --run out/a"    # each a command line

Its tensors hold tensors of the CPU and say that they are elsewhere. What a GPU refuses, it refuses:
an operation on tensors of two devices, and NumPy's look into one that is not on the CPU. So a
`.to(device)` that is missing shows. What it computes is the CPU's; kernels, streams and half
precision are not tried.
"""
from __future__ import annotations

import importlib
import shlex
import sys
from pathlib import Path

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

NAME = "standin"
# One of these may get a tensor of the CPU as well.
COPIES = (torch.ops.aten.copy_, torch.ops.aten._to_copy)
LOOKUPS = (torch.ops.aten.index, torch.ops.aten.index_put_, torch.ops.aten._index_put_impl_)


class Elsewhere(torch.Tensor):
    """A tensor of the stand-in; `held` is on the CPU."""

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device=torch.device(NAME, 0))
        tensor.held = held
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), options=None):
        return compute(function, arguments, options or {})

    def __reduce_ex__(self, protocol):
        return self.held.__reduce_ex__(protocol)

    def tolist(self):
        return self.held.tolist()

    def numpy(self, *_, **__):
        raise TypeError("NumPy cannot look into a tensor that is not on the CPU")

    __array__ = numpy


class Elsewheres(TorchDispatchMode):
    """Sees what makes new tensors, too, which has none to be dispatched by."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        return compute(function, arguments, options or {})


def compute(function, arguments: tuple, options: dict):
    """Compute on the CPU, what is on the stand-in there. Raises RuntimeError for a mixture."""
    tensors = [x for x in tree_leaves((arguments, options)) if isinstance(x, torch.Tensor)]
    ours = [x for x in tensors if isinstance(x, Elsewhere)]
    check_devices(function.overloadpacket, arguments, tensors)
    becomes_ours = bool(ours)
    if options.get("device") is not None:
        becomes_ours = options["device"].type == NAME
        options = options | {"device": torch.device("cpu")}
    elif function.overloadpacket is torch.ops.aten.copy_:
        becomes_ours = isinstance(arguments[0], Elsewhere)
    if function.overloadpacket is torch.ops.aten.is_pinned:
        return False
    with _disable_current_modes():
        result = function(*tree_map(held, arguments), **tree_map(held, options))
    same = {id(x.held): x for x in ours}   # what is changed in place is returned as it is

    def wrapped(x):
        if not becomes_ours or not isinstance(x, torch.Tensor):
            return x
        return same[id(x)] if id(x) in same else Elsewhere(x)
    return tree_map(wrapped, result)


def check_devices(function, arguments: tuple, tensors: list[torch.Tensor]) -> None:
    ours = [isinstance(x, Elsewhere) for x in tensors]
    if all(ours) or not any(ours) or function in COPIES:
        return
    if function in LOOKUPS:   # numbers of places may be on the CPU
        values = [arguments[0], *arguments[2:3]]
        fits = all(isinstance(x, Elsewhere) or x.dim() == 0 for x in values)
    else:   # and single numbers
        fits = all(isinstance(x, Elsewhere) or x.dim() == 0 for x in tensors)
    if not fits:
        shapes = [f"{x.device.type} {list(x.shape)}" for x in tensors]
        raise RuntimeError(f"{function} is asked for tensors of two devices: {', '.join(shapes)}")


def held(x):
    return x.held if isinstance(x, Elsewhere) else x


def install() -> None:
    """From now on `--device standin` is one, in this process."""
    backend_registration._setup_privateuseone_for_python_backend(NAME)
    getattr(torch, NAME).get_amp_supported_dtype = lambda: [torch.bfloat16]   # autocast asks
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    make = torch.tensor
    make_generator = torch.Generator

    def tensor(data, device=None, **options):   # not dispatched
        return make(data, **options).to(device or "cpu")

    class Generator:
        def __new__(cls, device="cpu"):
            return make_generator()

    torch.tensor = tensor
    torch.Generator = Generator
    Elsewheres().__enter__()


def run(line: str) -> None:
    """Run a program on the stand-in, which is installed. line: as after `python`."""
    program, *flags = shlex.split(line)
    sys.argv = [program, *flags, "--device", NAME]
    importlib.import_module(program.removesuffix(".py")).main()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    lines = sys.argv[1:]
    install()
    for line in lines:
        run(line)
