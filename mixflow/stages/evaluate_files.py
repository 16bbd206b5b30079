"""`python -m mixflow evaluate SAMPLES ...`: sample files and folders of one's own, without the rest of the pipeline."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mixflow.config import slice_key
from mixflow.evaluation import Estimate, Reference, load_reference, open_images, spread
from mixflow.evaluation.checks import comparison_warnings, require_size, rule_kind
from mixflow.evaluation.references import DENSITY_NEIGHBOURS, METRICS, require_metrics
from mixflow.runtime import paths
from mixflow.runtime.downloads import download, downloaded_file
from mixflow.runtime.errors import UserError, did_you_mean
from mixflow.runtime.files import file_sha256, read_json, write_json
from mixflow.runtime.processes import Processes, start_processes
from mixflow.runtime.progress import log
from mixflow.runtime.provenance import RunRecord
from mixflow.runtime.stopping import StopRequest
from mixflow.stages.image_features import Extractor, find_extractor
from mixflow.stages.measure import Measured, digits, measure_images, measurement
from mixflow.stages.references import KEPT_IMAGES, make_image_reference, require_extractor
from mixflow.tables import METRICS as SHOWN

ADM = ("fid", "sfid", "is", "precision", "recall")
SHORT = {
    "pr": ("precision", "recall"),
    "pr_exact": ("precision_exact", "recall_exact"),
    "dc": ("density", "coverage"),
    "adm": ADM,
}
# What is claimed of each number under `--compat adm`; tests/unit/test_eval_end_to_end.py holds it.
ADM_CLAIMS = {
    "fid": "equal to OpenAI's to 1e-4 relative (theirs: float32 means, a matrix root of a product)",
    "sfid": "equal to OpenAI's to 1e-5 relative",
    "is": "equal to OpenAI's to 1e-5 relative (theirs: float32), also where theirs is NaN from underflow",
    "precision": "equal to OpenAI's on a CPU but for an image or two (half-precision sums in TensorFlow's order there)",
    "recall": "equal to OpenAI's on a CPU but for a reference image or two (as precision)",
}
ADM_BASIS = (
    "these claims rest on a small random network that OpenAI's evaluator ran too, on images of 64 and 320 pixels; the "
    "published weights and files were not at hand (docs/evaluation.md names the pair to try)"
)
# Where the weights are published, for a folder without a config.yaml; config.yaml names the same.
PUBLISHED_WEIGHTS: dict[str, dict[str, Any]] = {
    "inception": {
        "url": "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        "files": ["weights-inception-2015-12-05-6726825d.pth"],
    },
    "dinov2": {
        "repo": "timm/vit_large_patch14_dinov2.lvd142m",
        "revision": "main",
        "files": ["model.safetensors"],
    },
}


def parse_metrics(text: str) -> list[str]:
    """Return the metrics of a comma-separated list; pr, pr_exact, dc and adm stand for several, all for every one."""
    names: dict[str, None] = {}
    for word in filter(None, (word.strip() for word in text.split(","))):
        if word not in METRICS and word not in SHORT and word != "all":
            raise UserError(f"--metrics: '{word}' is not known{did_you_mean(word, [*METRICS, *SHORT, 'all'])}")
        names |= dict.fromkeys(SHORT.get(word, (word,)))
    if not names:
        raise UserError(f"--metrics names none: give a list such as fid,sfid,is,pr; known: {', '.join(METRICS)}")
    return list(names)


def evaluate_files(
    samples: Sequence[Path],  # .npz files or folders of images
    *,
    reference: Path,  # ADM's .npz, EDM2's .pkl, or what `make_reference_file` wrote
    metrics: Sequence[str] | None,  # None: fid, sfid, is, precision and recall, as far as the reference goes
    weights: Path | None,  # of the network: a file, or the record of its download
    records: Mapping[str, Path],  # by kind, of the downloads at hand; what is in neither is fetched
    out: Path,  # metrics.json
    compat: str | None = None,  # "adm": OpenAI's five numbers, with what is claimed of them
    tf32: bool = False,
    keep_features: bool = False,
    scratch: Path = Path("scratch"),
    cache: Path | None = None,  # of fetched weights and of what is derived from references
    time_budget_minutes: float | None = None,
    expected_gpus: int | None = None,
) -> str | None:
    """Measure sets of images, write `out`, and return a table for the terminal (None on helper processes).

    One set: metrics.json as the pipeline writes it. Several, from disjoint seeds: {"sets": [one each], "spread":
    {metric: {mean, standard_deviation, minimum, count}}, ...}. Running it again after an interruption
    continues. Raises `UserError` for whatever cannot be measured, before anything is computed where that can be seen.
    """
    cache = cache or default_cache()
    if compat is not None:
        metrics = _adm_metrics(metrics, tf32)
    sources = [open_images(path) for path in samples]
    _refuse_to_overwrite(out, samples)
    kind = _kind(metrics, reference)
    processes, stop = start_processes(expected_gpus), StopRequest(time_budget_minutes)
    extractor = _extractor(kind, weights or records.get(kind), tf32, cache, processes)
    real = _reference(reference, extractor, cache, scratch, processes, stop)
    if metrics is None:
        wanted = [name for name in (*ADM, "fd_dinov2") if name in real.metrics()]
    else:
        wanted = real.metrics() if "all" in metrics else list(metrics)
    require_metrics(real, wanted, reference)
    if compat is not None and not real.facts["published"]:
        raise UserError(
            f"--compat adm speaks of numbers against published statistics, but those of '{reference}' were made here: "
            "give ADM's .npz, or leave out --compat"
        )
    for source in sources:  # all of them, before the first takes hours
        if real.size is not None:
            require_size(source.path, source.size, reference, real.size)
    hashes = [source.sha256() for source in sources]
    _refuse_equal(samples, hashes)

    results: list[Measured] = []
    for source, sha256 in zip(sources, hashes, strict=True):
        measured = measure_images(
            source, sha256, real, reference, extractor, wanted,
            scratch=scratch, processes=processes, stop=stop, keep_features=keep_features,
        )  # fmt: skip
        if measured is not None:
            told = _sampled_by(source.path, sha256)
            results.append(measured if told is None else measured._replace(labels=rule_kind(told["sampler"]["labels"])))
    processes.end_training()
    if not results:
        return None
    by_name = {str(path): one for path, one in zip(samples, results, strict=True)}
    warnings = comparison_warnings(
        {name: one.digests for name, one in by_name.items()}, {name: one.labels for name, one in by_name.items()}
    )
    protocol: dict[str, Any] = {"metrics": wanted, "measurement": measurement(real, extractor, results[0].num_images)}
    claims = {name: ADM_CLAIMS[name] for name in wanted} if compat else {}
    parents = {"reference": reference, "extractor": extractor.weights}
    record = RunRecord("evaluate", protocol, parents)
    sets = [
        {
            "samples": str(path),
            **one.summary(),
            "sampled_by": _sampled_by(path, sha256),
            "parents": {**record.parent_hashes, "samples": sha256},
        }
        for path, one, sha256 in zip(samples, results, hashes, strict=True)
    ]
    shared = {"protocol": protocol, **({"compat": {"adm": claims, "basis": ADM_BASIS}} if claims else {})}
    if len(sets) == 1:
        content = {**sets[0], **shared}
    else:
        content = {"sets": sets, "spread": _spreads(wanted, results), "warnings": warnings, **shared}
    write_json(out, content)
    record.write(_record_path(out), [out], images=sum(one.num_images for one in results))
    return _report(samples, results, wanted, warnings, claims, real, reference, out)


def make_reference_file(
    source: Path,
    *,
    metrics: str | None,  # what it is to serve: fd_dinov2 makes one of DINOv2's features
    weights: Path | None,
    records: Mapping[str, Path],
    out: Path,
    kept_images: int | None = None,
    tf32: bool = False,
    scratch: Path = Path("scratch"),
    cache: Path | None = None,
    time_budget_minutes: float | None = None,
    expected_gpus: int | None = None,
) -> None:
    """Make a reference from a folder or .npz of images, or from a published file of statistics."""
    if out.suffix != ".safetensors":
        raise UserError(f"--make-reference '{out}': a reference is a .safetensors file: give it that ending")
    if kept_images is not None and kept_images <= DENSITY_NEIGHBOURS:
        raise UserError(f"--kept-images {kept_images} is too few for precision, recall and the like: give at least 6")
    kind = _kind(None if metrics is None else parse_metrics(metrics), source)
    processes, stop = start_processes(expected_gpus), StopRequest(time_budget_minutes)
    extractor = _extractor(kind, weights or records.get(kind), tf32, cache or default_cache(), processes)
    make_image_reference(
        source, extractor, out, scratch=scratch, processes=processes, stop=stop,
        kept_images=kept_images or KEPT_IMAGES,
    )  # fmt: skip
    processes.end_training()


def default_cache() -> Path:
    """Return where fetched weights and derived references are kept: `mixflow` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mixflow"


# --- before anything is computed


def _adm_metrics(metrics: Sequence[str] | None, tf32: bool) -> list[str]:
    chosen = list(ADM) if metrics is None or "all" in metrics else list(metrics)
    if other := [name for name in chosen if name not in ADM]:
        raise UserError(f"--compat adm knows {', '.join(ADM)}, not {other[0]}: leave it out, or leave out --compat")
    if tf32:
        raise UserError("--compat adm is claimed of float32 features alone: leave out --tf32")
    return chosen


def _kind(metrics: Sequence[str] | None, reference: Path) -> str:
    kinds = list(dict.fromkeys(METRICS[name].kind for name in metrics or () if name != "all"))
    if len(kinds) > 1:
        raise UserError(
            "metrics of Inception and of DINOv2 need a reference each: run the command once for each of the two"
        )
    if kinds:
        return kinds[0]
    if reference.suffix == ".safetensors":
        return load_reference(reference).kind
    return "dinov2" if reference.suffix == ".pkl" else "inception"


def _refuse_to_overwrite(out: Path, samples: Sequence[Path]) -> None:
    """Metrics of other samples are not lost because two calls name no --out."""
    if not out.exists():
        return
    told = read_json(out)
    sets = told.get("sets", [told]) if isinstance(told, dict) else []
    if [one.get("samples") for one in sets if isinstance(one, dict)] != [str(path) for path in samples]:
        raise UserError(f"'{out}' holds something else than the metrics of these samples: name another file with --out")


def _refuse_equal(samples: Sequence[Path], hashes: Sequence[str]) -> None:
    first: dict[str, Path] = {}
    for path, sha256 in zip(samples, hashes, strict=True):
        if sha256 in first:
            raise UserError(
                f"'{first[sha256]}' and '{path}' hold the same images: give sets made from disjoint seeds, each once"
            )
        first[sha256] = path


def _extractor(kind: str, weights: Path | None, tf32: bool, cache: Path, processes: Processes) -> Extractor:
    if weights is None:
        with processes.main_process_first():
            weights = download(
                kind, PUBLISHED_WEIGHTS[kind],
                out=cache / f"{kind}.json", folder=cache / "downloads", locks=cache / "locks",
            )  # fmt: skip
    if weights.suffix == ".json":
        weights = downloaded_file(weights)
    return find_extractor(kind, weights, tf32)


def _reference(
    path: Path, extractor: Extractor, cache: Path, scratch: Path, processes: Processes, stop: StopRequest
) -> Reference:
    """Return the reference, with what is derived from it; that is kept in `cache`."""
    if not path.exists():
        raise UserError(f"reference '{path}' does not exist: correct the path, or make one with --make-reference")
    made = path
    if path.suffix != ".safetensors":
        key = slice_key(extractor.facts, file_sha256(path))
        made = cache / "references" / f"{path.stem}-{key}.safetensors"
        is_there = made.exists()
        processes.wait_for_everyone()  # all have looked before one of them makes it
        if not is_there:
            log.info("%s: deriving features, radii and factors once, kept in %s", path, made)
            make_image_reference(
                path, extractor, made, scratch=scratch, processes=processes, stop=stop, only_statistics=True
            )
        processes.wait_for_everyone()
    real = load_reference(made, processes.device)
    require_extractor(real, path, extractor)
    return real


def _sampled_by(path: Path, sha256: str) -> dict[str, Any] | None:
    """Return how samples were made, where a run.json beside them tells it of these very bytes."""
    beside = Path(paths.record(str(path)))
    if path.is_dir() or not beside.exists():
        return None
    record = read_json(beside)
    if record.get("stage") != "sample" or record.get("outputs", {}).get(path.name) != sha256:
        return None
    return record["settings"]


def _record_path(out: Path) -> Path:
    """run.json of the pipeline's folders belongs to the samples; this one bears the name of its result."""
    return out.with_name(f"{out.stem}.run.json")


# --- what is said at the end


def _spreads(metrics: Sequence[str], results: Sequence[Measured]) -> dict[str, dict[str, Any]]:
    told = {name: spread([one.estimates[name].value for one in results])._asdict() for name in metrics}
    return {name: {key: digits(value) for key, value in one.items()} for name, one in told.items()}


def _report(
    samples: Sequence[Path],
    results: Sequence[Measured],
    metrics: Sequence[str],
    warnings: Sequence[str],
    claims: Mapping[str, str],
    reference: Reference,
    reference_path: Path,
    out: Path,
) -> str:
    """Return what the terminal shows: the table, what it was measured on, claims and warnings."""
    facts = reference.facts
    behind = "published statistics" if facts["published"] else f"statistics of {facts['num_images']:,} images"
    kept = f", {facts['num_rows']:,} images kept" if facts["num_rows"] else ""
    lines = [
        _table([_short(path) for path in samples], results, metrics),
        f"reference {reference_path}: {behind}{kept}",
    ]
    for path, one in zip(samples, results, strict=True):
        labels = "" if one.labels == "unknown" else f", {one.labels} labels"
        lines.append(f"{path}: {one.num_images:,} images of {one.size[1]}x{one.size[0]}{labels}")
    lines.append(
        "±: one standard error of sampling noise only; retraining moves FID too, by about 1.3% (arXiv 2606.20536)"
    )
    if len(results) > 1:
        lines.append("mean, std, min: over the sets, which should come from disjoint seeds of one model")
    lines += [f"{SHOWN[name].name}: {claim}" for name, claim in claims.items()]
    lines += [ADM_BASIS] if claims else []
    told = dict.fromkeys([*(warning for one in results for warning in one.warnings), *warnings])
    lines += [f"warning: {warning}" for warning in told]
    return "\n".join([*lines, f"written to {out}"])


def _table(heads: Sequence[str], results: Sequence[Measured], metrics: Sequence[str]) -> str:
    several = len(results) > 1
    rows = [["", *heads, *(("mean", "std", "min") if several else ())]]
    for name in metrics:
        shown = SHOWN[name]
        estimates = [one.estimates[name] for one in results]
        decimals = max(_decimals(shown.factor * (estimate.standard_error or 0)) for estimate in estimates)
        cells = [_cell(shown.factor, estimate, decimals) for estimate in estimates]
        if several:
            told = spread([estimate.value for estimate in estimates])
            numbers = (told.mean, told.standard_deviation, told.minimum)
            cells += ["–" if x is None else f"{shown.factor * x:.{decimals}f}" for x in numbers]
        arrow = {"lower": " ↓", "higher": " ↑", None: ""}[shown.better]
        rows.append([f"{shown.name}{arrow}", *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows) + "\n"


def _decimals(error: float) -> int:
    """Return the decimals that show two digits of an error, at least two and at most eight of them; four without."""
    return 4 if error == 0 else min(max(1 - math.floor(math.log10(error)), 2), 8)


def _cell(factor: float, estimate: Estimate, decimals: int) -> str:
    value = f"{factor * estimate.value:.{decimals}f}"
    return value if estimate.standard_error is None else f"{value} ± {factor * estimate.standard_error:.{decimals}f}"


def _short(path: Path) -> str:
    """Return enough of a path to tell results/samples/a/b/samples.npz from its neighbours."""
    parent = path.parent.name
    return f"{parent}/{path.name}" if parent else path.name
