"""Take a weights file of one's own, or a peer's, into the pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mixflow.models import load_model, save_model
from mixflow.runtime.errors import UserError
from mixflow.runtime.files import file_sha256
from mixflow.runtime.progress import log
from mixflow.runtime.provenance import RunRecord


def import_weights(settings: dict[str, Any], *, file: Path, out: Path) -> None:
    """Check `file` against the entry's model and SHA-256, and write it under the peer's key names to `out`."""
    wanted = settings["weights"].get("sha256")
    if not file.exists():
        raise UserError(f"the weights of '{settings['checkpoint']}', '{file}', do not exist: put the file there")
    if wanted is not None and (found := file_sha256(file)) != wanted:
        raise UserError(
            f"the weights of '{settings['checkpoint']}', '{file}', have sha256 {found} but the entry says {wanted}: "
            "fetch the file again, or correct the entry"
        )
    record = RunRecord("import-weights", settings, {"file": file})
    model = settings["weights"]["model"]
    network = load_model(model["family"], file, num_heads=model["num_heads"], label_dropout=model["label_dropout"])
    save_model(out, network.state_dict(), model)
    record.write(out.parent / "run.json", [out])
    log.info("%s: weights in %s", settings["checkpoint"], out)
