"""Take a weights file of one's own, or a peer's, into the pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mixflow.models import save_model
from mixflow.runtime.downloads import downloaded_file
from mixflow.runtime.errors import UserError
from mixflow.runtime.files import file_sha256
from mixflow.runtime.progress import log
from mixflow.runtime.provenance import RunRecord
from mixflow.stages.networks import network_from_file


def import_weights(
    settings: dict[str, Any],
    *,
    file: Path,  # the weights file, or the record of a download where the entry names one
    out: Path,
) -> None:
    """Check a weights file against the entry's model and SHA-256, and write it under the peer's key names to `out`."""
    name, weights = settings["checkpoint"], settings["weights"]
    if "download" in weights:
        file = downloaded_file(file)  # its hash was checked when it was downloaded
    wanted = weights.get("sha256")
    if not file.exists():
        raise UserError(f"the weights of '{name}', '{file}', do not exist: put the file there")
    if wanted is not None and (found := file_sha256(file)) != wanted:
        raise UserError(
            f"the weights of '{name}', '{file}', have sha256 {found} but the entry says {wanted}: fetch the file "
            "again, or correct the entry"
        )
    record = RunRecord("import-weights", settings, {"file": file})
    model = weights["model"]
    network = network_from_file(model, file)
    _check_sizes(name, file, network.options, model)
    save_model(out, network.state_dict(), {"family": model["family"], **network.options})
    record.write(out.parent / "run.json", [out])
    log.info("%s: weights in %s", name, out)


def _check_sizes(name: str, file: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Compare what the shapes of a file tell with the entry. Projectors may be missing: only training needs them."""
    if found["input_size"] != wanted["input_size"]:
        raise UserError(
            f"the weights of '{name}', '{file}', are made for latents of {found['input_size']}x{found['input_size']} "
            f"(their pos_embed says so) but the entry's latents are {wanted['input_size']}x{wanted['input_size']}: "
            "name latents of the other resolution, or other weights"
        )
    for option in ("in_channels", "num_classes", "hidden_size", "depth", "patch_size", "learn_sigma"):
        # Both in the form that JSON has: pairs as lists.
        of_file, of_entry = (_as_json(sizes.get(option)) for sizes in (found, wanted))
        if of_file is not None and of_entry is not None and of_file != of_entry:
            raise UserError(
                f"the weights of '{name}', '{file}', have {option} {of_file} but the entry says {of_entry}: correct "
                "the entry, or name other weights"
            )


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
