"""The networks that look at images, and the pass over a set of images with them: any number of processes, resumable."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mixflow.config import slice_key
from mixflow.evaluation import load_inception
from mixflow.evaluation.features import Parts, Rows, See, Source, Sums, look
from mixflow.runtime.errors import UserError, did_you_mean
from mixflow.runtime.files import WorkFolder, file_sha256
from mixflow.runtime.processes import Processes
from mixflow.runtime.progress import Progress, log
from mixflow.runtime.stopping import StopRequest, Unfinished

KINDS = ("inception", "dinov2")


class Extractor(NamedTuple):
    """A network that looks at images, before it is loaded."""

    kind: str  # inception or dinov2
    weights: Path
    sha256: str  # of the weights
    tf32: bool

    @property
    def facts(self) -> dict[str, Any]:
        """What its features depend on, for protocols and keys."""
        return {"kind": self.kind, "tf32": self.tf32, "sha256": self.sha256}

    def load(self, device: torch.device) -> See:
        """Return the function from pixels to features by name. `UserError` for a file of another kind."""
        if self.kind == "inception":
            inception = load_inception(self.weights, device, tf32=self.tf32)
            names = ("pool", "spatial", "logits")
            return lambda pixels: dict(zip(names, inception(_pinned(pixels, device)), strict=True))
        from mixflow.models import load_dinov2_class  # timm takes seconds to import

        dinov2 = load_dinov2_class(self.weights, device)
        return lambda pixels: {"class": dinov2(pixels)}


def _pinned(pixels: Any, device: torch.device) -> torch.Tensor:
    """Return pixels that a GPU can fetch while the host goes on."""
    tensor = torch.from_numpy(pixels)
    return tensor.pin_memory() if device.type == "cuda" else tensor


def find_extractor(kind: str, weights: Path, tf32: bool = False) -> Extractor:
    """Return the extractor whose weights lie at `weights`. `UserError` for an unknown kind or a missing file."""
    if kind not in KINDS:
        raise UserError(f"extractor kind '{kind}' is not known{did_you_mean(kind, KINDS)}")
    if not weights.is_file():
        raise UserError(f"weights '{weights}' of the {kind} extractor do not exist: download them, or correct the path")
    return Extractor(kind, weights, file_sha256(weights), tf32)


@contextlib.contextmanager
def seen(
    images: Source,
    sha256: str,  # of the images
    extractor: Extractor,
    part: int,  # images per part
    collector: Callable[[], Rows | Sums],
    *,
    key: dict[str, Any],  # what else the parts depend on
    scratch: Path,
    processes: Processes,
    stop: StopRequest,
    keep: bool = False,  # the parts, for a later call with other metrics
) -> Iterator[Parts]:
    """Yield the parts of a set of images, all made, and remove them when the block ends well.

    Processes share the missing parts. Raises `Unfinished` when told to stop, with the finished parts kept.
    """
    name = f"features of {images.path}"
    work_key = slice_key({**extractor.facts, **key, "part": part}, sha256)
    with contextlib.closing(WorkFolder(scratch, "evaluate", images.path.stem or "images", work_key)) as work:
        if processes.is_main_process:
            work.open()
        processes.wait_for_everyone()
        parts = Parts(work.path, len(images), part)
        missing = parts.missing()
        processes.wait_for_everyone()  # all have seen the same parts before the first makes more
        if missing:
            # A run of neighbouring parts for each process: compressed files cannot be read out of order.
            share, rest = divmod(len(missing), processes.num_processes)
            begin = processes.process_index * share + min(processes.process_index, rest)
            mine = missing[begin : begin + share + (processes.process_index < rest)]
            mine_total = sum(parts.end(start) - start for start in mine)
            factor = processes.num_processes
            done = len(images) - sum(parts.end(start) - start for start in missing)
            folder = work.path if processes.is_main_process else None
            progress = Progress(name, done + factor * mine_total, "image", done=done, folder=folder)
            look(
                images,
                extractor.load(processes.device) if mine else _nothing,
                parts,
                mine,
                collector,
                should_stop=lambda: stop,
                advance=lambda n: progress.advance(factor * n, factor * n),
            )
            progress.close()
        processes.wait_for_everyone()
        if left := parts.missing():
            reason = stop.reason or "another process was told to stop"
            raise Unfinished(f"{name}: {len(left)} of {len(parts.starts())} parts are left because {reason}")
        yield parts
        processes.wait_for_everyone()
        if keep:
            log.info("%s: kept in %s", name, work.path)
        else:
            work.remove()


def _nothing(pixels: Any) -> dict[str, torch.Tensor]:
    raise AssertionError("a process without parts looks at nothing")
