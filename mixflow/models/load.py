"""Networks from weights and weights from networks: the peers' files and ours.

Sizes come from the shapes of the weights, so that a checkpoint needs no description beside it.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

from mixflow.config import SIT_SIZES
from mixflow.models.sit import SiT
from mixflow.runtime.errors import UserError, did_you_mean
from mixflow.runtime.files import atomic_path
from mixflow.runtime.weights_header import (
    METADATA_KEY,
    guess_architecture,
    saved_model_options,
    sit_options_from_shapes,
)

FAMILIES = {"sit": SiT}
WRAPPERS = ("ema", "model", "state_dict")  # in the order of preference: the published numbers are those of the EMA
TORCH_SUFFIXES = (".pt", ".pth", ".ckpt")

_SIT_OPTIONS = tuple(inspect.signature(SiT).parameters)
_SIT_HEADS = {size["hidden_size"]: size["num_heads"] for size in SIT_SIZES.values()}


def load_model(
    family: str,  # "sit"
    weights: str | os.PathLike[str] | Mapping[str, Any],  # file, or state dict (wrapped or flat)
    **options: Any,  # what shapes cannot tell: num_heads of unlisted widths, label_dropout; others are checked
) -> nn.Module:
    """Return the network that `weights` hold, in float32 on the CPU and in eval mode.

    Reads .safetensors, .pt, .pth and .ckpt files under the peer's key names, flat or under "ema", "model" or
    "state_dict" (preferred in this order), with or without the prefixes of DDP and torch.compile. The label table is
    taken to end with the null class unless label_dropout is 0. No code from a file is ever run.

    Raises `UserError` for an unknown family or option, an unreadable file, and weights of another architecture.
    """
    network = _family(family)
    read = _read(weights)
    sizes = _sit_options(read, options)
    # Meta tensors first: no time is spent on initial values that the file replaces.
    with torch.device("meta"):
        net = network(**sizes).float()
    _check_fit(read, net, sizes)
    net.to_empty(device="cpu")
    net.load_state_dict(read.tensors)  # copies, so that the file may change or vanish afterwards
    return net.eval()


def build_model(family: str, **options: Any) -> nn.Module:
    """Return a fresh network with the peer's initial weights; `options` are the constructor's. Raises `UserError`."""
    network = _family(family)
    _check_option_names(family, options)
    for name, parameter in inspect.signature(network).parameters.items():
        if name not in options and parameter.default is inspect.Parameter.empty:
            raise UserError(f"a fresh network of family '{family}' needs the option '{name}': add it")
    _check_divisors(options)
    return network(**options)


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the weights in a file, unwrapped and without prefixes, memory-mapped on the CPU. Raises `UserError`."""
    return _read(path).tensors


def describe_weights(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Say what a weights file holds, for `mixflow inspect`, without building the network. Raises `UserError`.

    `family` is None for weights that no family here can load; the sizes are then left out.
    """
    read = _read(path)
    architecture = guess_architecture(read.tensors)
    family = "sit" if architecture == "a SiT network" else None
    description: dict[str, Any] = {
        "family": family,
        "architecture": architecture,
        "wrapper": read.wrapper,
        "keys": len(read.tensors),
        "parameters": sum(tensor.numel() for tensor in read.tensors.values()),
        "dtype": ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in read.tensors.values()})),
    }
    if family is not None:
        sizes = sit_options_from_shapes(_shapes(read), source=read.source, null_row=_has_null_row(read.saved))
        description |= {"num_heads": _SIT_HEADS.get(sizes["hidden_size"])} | sizes | read.saved
    return description


def save_model(
    path: str | os.PathLike[str],
    state_dict: Mapping[str, Tensor],
    model_options: Mapping[str, Any],  # such as `net.options`; what shapes cannot tell is read back by load_model
) -> None:
    """Write weights as safetensors, atomically; equal weights and options give equal bytes."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    # One metadata entry only: safetensors writes several in random order.
    metadata = {METADATA_KEY: json.dumps({"model": dict(model_options)}, sort_keys=True)}
    with atomic_path(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        safetensors.torch.save_file(tensors, temporary, metadata)
        temporary.chmod(mode)  # safetensors leaves files that only their owner can read, whatever the umask


class _Weights(NamedTuple):
    source: str  # what to call them in messages
    wrapper: str | None  # the entry of the file that held them
    tensors: dict[str, Tensor]
    saved: dict[str, Any]  # options that mixflow wrote beside them


def _read(weights: str | os.PathLike[str] | Mapping[str, Any]) -> _Weights:
    if isinstance(weights, Mapping):
        return _unwrap(weights, "the given state dict", {})
    path = Path(weights)
    source = f"weights file '{path}'"
    if path.suffix == ".safetensors":
        saved = saved_model_options(path)  # also finds a damaged file
        try:
            return _unwrap(safetensors.torch.load_file(path), source, saved)
        except safetensors.SafetensorError as error:
            raise UserError(f"{source} is garbled ({error}): download or make it again") from error
    if path.suffix not in TORCH_SUFFIXES:
        raise UserError(f"{source} has none of the endings .safetensors, {', '.join(TORCH_SUFFIXES)}: rename it")
    if not path.is_file():
        raise UserError(f"{source} does not exist: make or download it first, or correct the path")
    return _unwrap(_read_torch_file(path, source), source, {})


def _read_torch_file(path: Path, source: str) -> Any:
    is_zip = zipfile.is_zipfile(path)  # older files are bare pickles, which cannot be memory-mapped
    # The peers' training checkpoints keep their command line as a Namespace, which only holds attributes.
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, UnicodeDecodeError) as error:
            unsafe = re.search(r"GLOBAL ([\w.]+)", str(error))
            if unsafe is None:
                raise UserError(f"{source} is truncated or is not a torch file: download or make it again") from error
            raise UserError(
                f"{source} cannot be loaded safely, for it holds '{unsafe[1]}', which may run code: if you trust it, "
                "read it once with torch.load(..., weights_only=False) and write its state dict with "
                "safetensors.torch.save_file"
            ) from error


def _unwrap(payload: Any, source: str, saved: dict[str, Any]) -> _Weights:
    if not isinstance(payload, Mapping):
        raise UserError(f"{source} holds a {type(payload).__name__}, not a state dict: save the network's state_dict()")
    wrapper = next((name for name in WRAPPERS if isinstance(payload.get(name), Mapping)), None)
    entries = payload if wrapper is None else payload[wrapper]
    strangers = [
        repr(name) for name, value in entries.items() if not isinstance(name, str) or not isinstance(value, Tensor)
    ]
    if strangers or not entries:
        raise UserError(
            f"{source} holds no flat state dict ({_some(strangers) or 'it is empty'}): give one, or wrap it under "
            f"{', '.join(repr(name) for name in WRAPPERS)}"
        )
    return _Weights(source, wrapper, {_plain_name(name): value for name, value in entries.items()}, saved)


def _plain_name(name: str) -> str:
    """Drop the prefixes of torch.compile (of the network or of a block) and of DistributedDataParallel."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def _shapes(read: _Weights) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in read.tensors.items()}


def _has_null_row(options: Mapping[str, Any]) -> bool:
    return options.get("label_dropout", 0.1) > 0


def _sit_options(read: _Weights, given: dict[str, Any]) -> dict[str, Any]:
    """Return the constructor's options: sizes from shapes; the rest from the file's metadata, `given`, the table."""
    _check_option_names("sit", given)
    told = given | {name: read.saved[name] for name in ("num_heads", "label_dropout") if name in read.saved}
    sizes = sit_options_from_shapes(_shapes(read), source=read.source, null_row=_has_null_row(told))
    sizes["num_heads"] = told.get("num_heads", _SIT_HEADS.get(sizes["hidden_size"]))
    if sizes["num_heads"] is None:
        raise UserError(
            f"{read.source} has hidden_size {sizes['hidden_size']}, from which the number of attention heads cannot be "
            "told: give the option num_heads"
        )
    for name, value in given.items():
        if value != sizes.get(name, value):
            raise UserError(f"{read.source} has {name} {sizes[name]} where {value} is asked for: correct one of them")
    if _has_null_row(told | given) != _has_null_row(told):
        raise UserError(
            f"{read.source} was saved with label_dropout {told['label_dropout']} where {given['label_dropout']} is "
            "asked for, but only one of them has a null class: correct one of them"
        )
    options = told | given | sizes
    _check_divisors(options)
    return options


def _family(family: str) -> type[SiT]:
    if family not in FAMILIES:
        raise UserError(f"'{family}' is not a family of networks{did_you_mean(family, FAMILIES)}")
    return FAMILIES[family]


def _check_option_names(family: str, options: Mapping[str, Any]) -> None:
    for name in options:
        if name not in _SIT_OPTIONS:
            raise UserError(f"'{name}' is not an option of family '{family}'{did_you_mean(name, _SIT_OPTIONS)}")


def _check_divisors(options: Mapping[str, Any]) -> None:
    # The position table has sines and cosines of two axes, hence the 4.
    pairs = [("hidden_size", "num_heads", options["num_heads"]), ("hidden_size", "4", 4)]
    for whole, divisor, value in [*pairs, ("input_size", "patch_size", options["patch_size"])]:
        if value < 1 or options[whole] % value:
            raise UserError(f"{whole} {options[whole]} is not a multiple of {divisor} {value}: change one of them")


def _check_fit(read: _Weights, net: nn.Module, options: Mapping[str, Any]) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    found = _shapes(read)
    misfits = [
        ("missing", [f"'{name}'" for name in wanted if name not in found]),
        ("unexpected", [f"'{name}'" for name in found if name not in wanted]),
        ("misshapen", [f"'{n}' {list(found[n])}" for n in wanted if n in found and found[n] != wanted[n]]),
    ]
    complaints = [f"{kind} {_some(names)}" for kind, names in misfits if names]
    if complaints:
        described = (
            f"hidden_size {options['hidden_size']}, depth {options['depth']}, patch_size {options['patch_size']}"
        )
        raise UserError(
            f"{read.source} does not fit a SiT of {described} ({'; '.join(complaints)}) and seems to hold "
            f"{guess_architecture(found)}: correct the path or the family"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
