"""Means and covariances of features as others publish them: ADM's .npz files, and EDM2's .pkl files, safely."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from mixflow.runtime.errors import UserError

# Kind of network -> feature -> names of its mean and covariance. A file has at least the first feature of a kind.
NPZ_NAMES = {
    "inception": {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")},
    "dinov2": {"class": ("mu", "sigma")},
}
_PKL_NAMES = {  # entry.entry of nested dictionaries
    "inception": {"pool": ("fid.mu", "fid.sigma")},
    "dinov2": {"class": ("fd_dinov2.mu", "fd_dinov2.sigma")},
}
_DISTANCES = {"pool": "FID", "spatial": "sFID", "class": "FD-DINOv2"}
_EXAMPLES = {"inception": "ADM's VIRTUAL_imagenet256_labeled.npz", "dinov2": "EDM2's img512.pkl"}
_ASYMMETRY = 1e-5  # of the largest entry: more than float32 sums differ by, and less than any mistake
_ZIP, _PICKLE = b"PK", b"\x80"  # first bytes; pickles of protocols 0 and 1, which EDM2 never wrote, begin otherwise


def read_statistics(path: str | os.PathLike[str], kind: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Return mean [d] and covariance [d,d], float64, of every feature of a network of `kind` that a file tells.

    inception: `pool` (FID) from mu and sigma of an .npz (ADM, EDM, pytorch-fid, torch-fidelity) or from fid of EDM2's
    .pkl, and `spatial` (sFID) where there are mu_s and sigma_s too. dinov2: `class` (FD-DINOv2) from fd_dinov2 of a
    .pkl, or from mu and sigma of an .npz, which does not tell whose they are. Nothing in a file is run.

    Raises `UserError` for a damaged file, one that holds something else, or numbers that are no mean and covariance.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(2)
            file.seek(0)
            if start == _ZIP:
                pairs = NPZ_NAMES[kind]
                arrays, keys = _read_npz(file, {name for pair in pairs.values() for name in pair})
            elif start[:1] == _PICKLE:
                pairs = _PKL_NAMES[kind]
                arrays, keys = _read_pickle(file, path)
            else:
                raise UserError(
                    f"'{path}' is neither an .npz nor a .pkl of statistics: give {_EXAMPLES[kind]} or its like"
                )
    except FileNotFoundError:
        raise UserError(f"'{path}' does not exist: fetch it first, or correct the path") from None
    except UserError:
        raise
    except Exception as error:  # which ones a damaged file raises is not written down, for pickles least of all
        raise UserError(
            f"the statistics in '{path}' cannot be read ({type(error).__name__}: {error}): fetch the file again"
        ) from None
    statistics = {}
    for number, (feature, pair) in enumerate(pairs.items()):
        missing = [name for name in pair if name not in arrays]
        if len(missing) == len(pair) and number > 0:
            continue
        if missing:
            raise UserError(_lacking(path, kind, feature, missing, keys))
        statistics[feature] = _checked(path, *((name, arrays[name]) for name in pair))
    return statistics


def has_statistics(path: str | os.PathLike[str]) -> bool:
    """Return whether a file is an .npz with a mean of features, whatever else it holds. Reads its directory alone."""
    return "mu.npy" in _members(path)


def has_images(path: str | os.PathLike[str]) -> bool:
    """Return whether a file is an .npz with images, whatever else it holds. Reads its directory alone."""
    return "arr_0.npy" in _members(path)


def _members(path: str | os.PathLike[str]) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, OSError):
        return []


def _read_npz(file: IO[bytes], names: set[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the arrays among `names` that there are, and the names of all arrays."""
    with np.load(file, allow_pickle=False) as archive:
        keys = list(archive.files)
        return {name: archive[name] for name in keys if name in names}, keys


def _read_pickle(file: IO[bytes], path: str | os.PathLike[str]) -> tuple[dict[str, Any], list[str]]:
    """Return all entries of nested dictionaries, and their names, joined by dots."""
    payload = _ArrayUnpickler(file, path).load()
    if not isinstance(payload, dict):
        raise UserError(
            f"'{path}' holds a {type(payload).__name__} where statistics by the name of their metric are wanted "
            "(fid, fd_dinov2): give a file that EDM2's calculate_metrics.py made"
        )
    arrays: dict[str, Any] = {}
    for metric, entry in payload.items():
        arrays |= {f"{metric}.{key}": x for key, x in entry.items()} if isinstance(entry, dict) else {metric: entry}
    return arrays, [str(name) for name in arrays]


def _latin1(text: str, encoding: str) -> bytes:
    """What bytes are made with in pickles of protocol 2, and nothing else."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding '{encoding}'")
    return text.encode("latin1")


# What a pickle may name, in the wording of every protocol (2 to 5) and NumPy (1 and 2). Calling these makes arrays.
_RECONSTRUCT, _FROM_BUFFER = (np.zeros(1).__reduce_ex__(protocol)[0] for protocol in (4, 5))
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _RECONSTRUCT for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _FROM_BUFFER for core in ("core", "_core")},
    ("_codecs", "encode"): _latin1,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Makes plain values, containers and arrays, and calls nothing else that a file names."""

    def __init__(self, file: IO[bytes], path: str | os.PathLike[str]) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        if (module, name) not in _ALLOWED:
            raise UserError(
                f"'{self._path}' is refused, for it names '{module}.{name}', which may run code and has no place among "
                "statistics: fetch it again from who published it, or save the arrays as an .npz"
            )
        return _ALLOWED[module, name]


def _lacking(path: str | os.PathLike[str], kind: str, feature: str, missing: list[str], keys: list[str]) -> str:
    distance = _DISTANCES[feature]
    if "arr_0" in keys and "mu" not in keys:
        return (
            f"'{path}' holds images (arr_0) but no statistics (mu, sigma), and {distance} to these few images compares "
            f"with no published number: give {_EXAMPLES[kind]} or its like or, if that is meant, make a reference of "
            f"them with python -m mixflow evaluate {path} --make-reference reference.safetensors"
        )
    held = ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
    return (
        f"'{path}' lacks {' and '.join(missing)}, which {distance} needs (it holds {held or 'nothing'}): give "
        f"{_EXAMPLES[kind]} or its like"
    )


def _checked(path: str | os.PathLike[str], mean: tuple[str, Any], covariance: tuple[str, Any]) -> tuple[Tensor, Tensor]:
    """Return mean and covariance, each handed over with its name, in float64."""
    for name, x in (mean, covariance):
        if not isinstance(x, np.ndarray) or x.dtype.kind != "f":
            found = f"{x.dtype}" if isinstance(x, np.ndarray) else f"a {type(x).__name__}"
            raise UserError(f"{name} of '{path}' is {found}, not an array of floats: give another file")
    mu, sigma = (np.array(x, dtype=np.float64, order="C") for _, x in (mean, covariance))
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or len(mu) == 0:
        raise UserError(
            f"{mean[0]} and {covariance[0]} of '{path}' have shapes {list(mu.shape)} and {list(sigma.shape)} where [d] "
            "and [d, d] are wanted: give another file"
        )
    for name, x in ((mean[0], mu), (covariance[0], sigma)):
        if not np.isfinite(x).all():
            raise UserError(f"{name} of '{path}' holds NaN or infinity: fetch the file again")
        if not x.any():
            raise UserError(f"{name} of '{path}' holds nothing but zeros: fetch the file again")
    asymmetry = np.abs(sigma - sigma.T).max() / np.abs(sigma).max()
    if asymmetry > _ASYMMETRY or (np.diagonal(sigma) < 0).any():
        raise UserError(
            f"{covariance[0]} of '{path}' is no covariance (it is not symmetric, or has negative variances): fetch the "
            "file again"
        )
    return torch.from_numpy(mu), torch.from_numpy(sigma)
