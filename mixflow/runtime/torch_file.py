"""Reading torch files without running the code that may be in them."""

from __future__ import annotations

import argparse
import pickle
import re
import zipfile
from pathlib import Path
from shlex import quote
from typing import Any

import torch

from mixflow.runtime.errors import UserError

_BROKEN = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, UnicodeDecodeError, OSError)


def read_torch_file(path: Path, source: str, *, trust: bool = False) -> Any:
    """Return what is in a torch file, on the CPU, memory-mapped where possible; `source` names it in messages.

    No code from it is run unless `trust`. Raises `UserError` for a file that is missing or broken, or that holds more
    than tensors, plain containers and the peers' command lines.
    """
    if not path.is_file():
        raise UserError(f"{source} does not exist: make or download it first, or correct the path")
    is_zip = zipfile.is_zipfile(path)  # older files are bare pickles, which cannot be memory-mapped
    # The peers' training checkpoints keep their command line as a Namespace, which only holds attributes.
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            return torch.load(path, map_location="cpu", weights_only=not trust, mmap=is_zip)
        except (ImportError, AttributeError) as error:
            raise UserError(
                f"{source} holds objects of a program that is not installed here ({error}): convert it where that is"
            ) from error
        except _BROKEN as error:
            unsafe = re.search(r"GLOBAL ([\w.]+)", str(error))
            if unsafe is None:
                raise UserError(f"{source} is truncated or is not a torch file: download or make it again") from error
            raise UserError(
                f"{source} cannot be loaded safely, for it holds '{unsafe[1]}', which may run code: if you trust it, "
                f"run `python -m mixflow convert-weights {quote(str(path))} --trust --out "
                f"{quote(str(path.with_suffix('.safetensors')))}`"
            ) from error
