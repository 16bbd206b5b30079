"""Networks from weights: the peers' files and ours.

Sizes come from the shapes of the weights, so that a checkpoint needs no description beside it.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from mixflow.config import SIT_SIZES
from mixflow.models.dit_dh import DiTDH
from mixflow.models.exact import GaussianField, MixtureField
from mixflow.models.network import VelocityNetwork
from mixflow.models.repa import REPA
from mixflow.models.sit import SiT
from mixflow.models.weights import Weights, check_fit, read_weights
from mixflow.runtime.errors import UserError, did_you_mean
from mixflow.runtime.weights_header import guess_architecture, guess_family, options_from_shapes

FAMILIES: dict[str, type[VelocityNetwork]] = {
    "sit": SiT,
    "repa": REPA,
    "rae": DiTDH,
    "gaussian": GaussianField,
    "mixture": MixtureField,
}

_HEADS = {size["hidden_size"]: size["num_heads"] for size in SIT_SIZES.values()}
_ENCODER_DEPTH = 8  # REPA's default

# What shapes may not tell: option -> what a file that does not say it must mean, None where that cannot be known.
_UNTOLD: dict[str, Callable[[Mapping[str, Any]], int | None]] = {
    "num_classes": lambda sizes: None,  # of an exact field
    "depth": lambda sizes: None,  # of a DiT-DH whose trunk and head are equally wide
    "num_heads": lambda sizes: _HEADS.get(sizes["hidden_size"]),
    # Without projectors it means nothing.
    "encoder_depth": lambda sizes: (
        _ENCODER_DEPTH if sizes["depth"] >= _ENCODER_DEPTH else None if sizes["z_dims"] else sizes["depth"]
    ),
}


def load_model(
    family: str,  # "sit" | "repa" | "rae", or of an exact field "gaussian" | "mixture"
    weights: str | os.PathLike[str] | Mapping[str, Any],  # file, or state dict (wrapped or flat)
    **options: Any,  # what shapes cannot tell: num_heads of unlisted widths, label_dropout; others are checked
) -> VelocityNetwork:
    """Return the network that `weights` hold, in float32 on the CPU and in eval mode.

    Reads .safetensors, .pt, .pth and .ckpt files under the peer's key names (REPA's legacy ones too), flat or under
    "ema", "model" or "state_dict" (preferred in this order), with or without the prefixes of DDP and torch.compile. The
    label table is taken to end with the null class unless label_dropout is 0. No code from a file is ever run.

    REPA's encoder_depth comes from our own metadata, legacy key names or the training arguments in the file, else from
    the option, else it is 8, the peer's default. A file without projectors gives a network without (z_dims []),
    whatever z_dims asks for: sampling needs none, and `check_projectors` tells those who train.

    Of rae, sizes are pairs (trunk, head). Shapes tell everything but the label_dropout, and the depth where the two are
    equally wide.

    Of an exact field, law and gamma come from our own metadata, else from the options, else the law is uniform.

    Raises `UserError` for an unknown family or option, an unreadable file, and weights of another architecture.
    """
    network = _family(family)
    read = read_weights(weights)
    sizes = _options(family, read, options)
    # Meta tensors first: no time is spent on initial values that the file replaces.
    with torch.device("meta"):
        net = network(**sizes).float()
    sketch = ", ".join(f"{name} {sizes[name]}" for name in ("hidden_size", "depth", "patch_size") if name in sizes)
    check_fit(read, net, f"a {network.__name__} of {sketch}")
    net.to_empty(device="cpu")
    net.load_state_dict(read.tensors)  # copies, so that the file may change or vanish afterwards
    return net.eval()


def build_model(family: str, **options: Any) -> VelocityNetwork:
    """Return a fresh network with the peer's initial weights; `options` are the constructor's. Raises `UserError`."""
    network = _family(family)
    _check_option_names(family, options)
    for name, parameter in _parameters(network).items():
        if name not in options and parameter.default is inspect.Parameter.empty:
            raise UserError(f"a fresh network of family '{family}' needs the option '{name}': add it")
    _check_numbers(options)
    return network(**options)


def describe_weights(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Say what a weights file holds, for `mixflow inspect`, without building the network. Raises `UserError`.

    `family` is None for weights that no family here can load; the sizes are then left out.
    """
    read = read_weights(path)
    family = read.told.get("family", guess_family(read.tensors))
    description: dict[str, Any] = {
        "family": family,
        "architecture": guess_architecture(read.tensors),
        "wrapper": read.wrapper,
        "keys": len(read.tensors),
        "parameters": sum(tensor.numel() for tensor in read.tensors.values()),
        "dtype": ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in read.tensors.values()})),
    }
    if family is not None:
        sizes = _sizes(family, read, read.told)
        untold: dict[str, Any] = {"depth": None} if family == "rae" else {}
        if family in ("sit", "repa"):
            untold = {"num_heads": _HEADS.get(sizes["hidden_size"])}
        description |= untold | sizes | read.told
        if family == "sit" and "family" not in read.told and not sizes["learn_sigma"]:
            description["architecture"] = "a SiT network, or a REPA network without projectors: names cannot tell"
    if read.legacy:
        description["key_names"] = "REPA's legacy ones"
    if read.beside:
        description["beside"] = read.beside
    return description


def _sizes(family: str, read: Weights, told: Mapping[str, Any]) -> dict[str, Any]:
    shapes = {name: tuple(tensor.shape) for name, tensor in read.tensors.items()}
    sizes = options_from_shapes(family, shapes, source=read.source, null_row=_has_null_row(told))
    return {"z_dims": []} | sizes if family == "repa" else sizes


def _has_null_row(options: Mapping[str, Any]) -> bool:
    return options.get("label_dropout", 0.1) > 0


def _options(family: str, read: Weights, given: dict[str, Any]) -> dict[str, Any]:
    """Return the constructor's options: sizes from shapes; the rest from the file's words, `given`, the defaults."""
    _check_option_names(family, given)
    given = {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
    if read.told.get("family", family) != family:
        raise UserError(f"{read.source} holds a network of family '{read.told['family']}', not '{family}': correct one")
    known = _parameters(FAMILIES[family])
    words = [name for name in (*_UNTOLD, "label_dropout", "law", "gamma") if name in read.told and name in known]
    told = given | {name: read.told[name] for name in words}
    sizes = _sizes(family, read, told)
    for name, default in _UNTOLD.items():
        if name in known and name not in sizes:
            sizes[name] = told.get(name, default(sizes))
            if sizes[name] is None:
                held = (
                    " and ".join(f"{size} {sizes[size]}" for size in ("hidden_size", "depth") if sizes.get(size))
                    or "a field"
                )
                raise UserError(f"{read.source} has {held}, from which {name} cannot be told: give the option {name}")
    for name, value in given.items():
        found = sizes.get(name, value)
        if value != found and (name, found) != ("z_dims", []):
            raise UserError(f"{read.source} has {name} {found} where {value} is asked for: correct one of them")
    if _has_null_row(told | given) != _has_null_row(told):
        raise UserError(
            f"{read.source} was saved with label_dropout {told['label_dropout']} where {given['label_dropout']} is "
            "asked for, but only one of them has a null class: correct one of them"
        )
    options = told | given | sizes
    _check_numbers(options)
    return options


def _family(family: str) -> type[VelocityNetwork]:
    if family not in FAMILIES:
        raise UserError(f"'{family}' is not a family of networks{did_you_mean(family, FAMILIES)}")
    return FAMILIES[family]


def _parameters(network: type[VelocityNetwork]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(network).parameters)


def _check_option_names(family: str, options: Mapping[str, Any]) -> None:
    known = _parameters(FAMILIES[family])
    for name in options:
        if name not in known:
            raise UserError(f"'{name}' is not an option of family '{family}'{did_you_mean(name, known)}")


def _check_numbers(options: Mapping[str, Any]) -> None:
    if "hidden_size" not in options:  # an exact field
        return
    if "patch_size" not in options:
        _check_pairs(options)
        return
    # The position table has sines and cosines of two axes, hence the 4.
    pairs = [("hidden_size", "num_heads", options["num_heads"]), ("hidden_size", "4", 4)]
    for whole, divisor, value in [*pairs, ("input_size", "patch_size", options["patch_size"])]:
        if value < 1 or options[whole] % value:
            raise UserError(f"{whole} {options[whole]} is not a multiple of {divisor} {value}: change one of them")
    if not 1 <= options.get("encoder_depth", 1) <= options["depth"]:
        raise UserError(
            f"encoder_depth {options['encoder_depth']} is not one of the blocks 1 to {options['depth']}: change it"
        )


def _check_pairs(options: Mapping[str, Any]) -> None:
    """Check the sizes of a DiT-DH."""
    for name in ("hidden_size", "depth", "num_heads"):
        pair = options[name]
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(n, int) and n > 0 for n in pair):
            raise UserError(f"{name} is {pair} where a rae network has two numbers: give [trunk, head]")
    for width, heads in zip(options["hidden_size"], options["num_heads"], strict=True):
        # Rotary positions turn pairs of channels, one half of them by the row and one by the column, hence the 4.
        if width % (4 * heads):
            raise UserError(f"hidden_size {width} is not a multiple of 4 x num_heads {heads}: change one of them")
