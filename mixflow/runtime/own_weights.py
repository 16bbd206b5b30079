"""Files of the small networks that the pipeline trains for itself: safetensors that tell what they are."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mixflow.runtime.errors import UserError
from mixflow.runtime.files import atomic_path

Path = str | os.PathLike[str]


def write_own_weights(path: Path, kind: str, weights: Mapping[str, Tensor], options: Mapping[str, Any]) -> None:
    """Write a state dict and the options of its network, atomically; equal weights give equal bytes."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in weights.items()}
    # One metadata key only: safetensors writes several in no fixed order.
    metadata = {"mixflow": json.dumps({"kind": kind, **options}, sort_keys=True)}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def read_own_weights(path: Path, kind: str, verb: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return (state dict on the CPU, options) of what `write_own_weights` wrote; `verb` trains such a network.

    Raises `UserError` for a missing file, one that cannot be read, or one of another kind.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            options = json.loads((file.metadata() or {}).get("mixflow", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError:
        raise UserError(f"{kind} '{path}' does not exist: train it with {verb}, or correct the path") from None
    except (SafetensorError, json.JSONDecodeError) as error:
        raise UserError(f"{kind} '{path}' cannot be read ({error}): delete it and train it again") from None
    if options.pop("kind", None) != kind:
        raise UserError(f"'{path}' is no {kind} written by mixflow: give the file that {verb} made")
    return tensors, options
