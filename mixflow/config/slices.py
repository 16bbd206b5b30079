"""What each stage is handed: the part of the config that decides its result, and nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from mixflow.config.checks import check_images, check_pair, check_slow_flow
from mixflow.config.entries import Checkpoint, Classifier, Column, Pair, Row
from mixflow.config.replicates import replicates
from mixflow.config.samplers import Dopri5
from mixflow.config.sources import RAE, SDVAE, Gaussian, ImageNet
from mixflow.runtime.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from mixflow.config.resolved import Config


REHEARSAL_NOTE = (
    "This is a rehearsal: few steps, few images, and small random stand-ins for weights and ImageNet. The numbers mean "
    "nothing."
)


def _slice_stand_ins(config: Config) -> dict[str, Any]:
    if config.stand_ins is None:
        raise UserError("stand_ins: missing from the config: only the rehearsal has any, name its file with --config")
    folder = config.stand_ins.folder + "/"

    def files_of(download: str | None) -> list[str]:
        """Return the files to make: those of a download that lies among the stand-ins."""
        source = config.downloads[download] if download else None
        if source is None or source.folder is None or not f"{source.folder}/".startswith(folder):
            return []
        return [f"{source.folder}/{file}" for file in source.files]

    def made(section: str) -> Iterator[tuple[str, Any, list[str]]]:
        """Yield (name, entry, files to make) of the entries with anything to make."""
        for name, entry in getattr(config, section).items():
            download = entry.weights and entry.weights.download if section == "checkpoints" else entry.download
            if files := files_of(download):
                yield name, entry, files

    def parts_of(name: str, entry: RAE) -> dict[str, Any]:
        """Return the files to make of a representation autoencoder, by role, and what they must fit."""
        parts = {role: files_of(download) for role, download in entry.files_for("encode", "latents", "decode").items()}
        files = {role: found[0].removesuffix("/config.json") for role, found in parts.items() if found}
        sizes = {
            config.latent_shape(latents)[1] for latents, used in config.latents.items() if used.autoencoder == name
        }
        # Without latents nothing encodes with it.
        return {**files, **entry.settings(), "size": sizes.pop()} if files and sizes else {}

    rae = {name: parts_of(name, entry) for name, entry in config.autoencoders.items() if isinstance(entry, RAE)}
    autoencoders = {
        files[0]: entry.dump("download", "kind")
        for entry in config.autoencoders.values()
        if isinstance(entry, SDVAE) and (files := files_of(entry.download))
    }

    images = {
        dataset.folder: {"num_classes": dataset.num_classes, "num_images": dataset.num_images}
        for dataset in config.datasets.values()
        if isinstance(dataset, ImageNet) and dataset.folder.startswith(folder)
    }
    extractors = {name: files[0] for name, _, files in made("extractors")}
    resolutions = {
        reference: dataset.resolution for dataset in config.datasets.values() for reference in dataset.references
    }
    return {
        "folder": config.stand_ins.folder,
        "seed": config.stand_ins.seed,
        "images": images,
        "networks": {files[0]: config.network_options(name) for name, _, files in made("checkpoints")},
        "autoencoders": autoencoders,
        "rae": {name: parts for name, parts in rae.items() if parts},
        "encoders": {files[0]: entry.num_features for _, entry, files in made("encoders")},
        "extractors": {file: config.extractors[name].dump("download") for name, file in extractors.items()},
        "references": {
            files[0]: {
                "resolution": resolutions[name],
                "extractor": extractors[entry.extractor],
                "kind": config.extractors[entry.extractor].kind,
            }
            for name, entry, files in made("references")
        },
    }


def _slice_download(config: Config, name: str) -> dict[str, Any]:
    return {"download": name, "source": config.get("downloads", name).dump()}


def _slice_cache_latents(config: Config, name: str) -> dict[str, Any]:
    entry = config.get("latents", name)
    if entry.encoded_from is not None:
        raise UserError(
            f"latents.{name} are encoded from '{entry.encoded_from}' while training and have no cache: cache that one, "
            "or write shard_size and mirrors in place of encoded_from"
        )
    return {
        "latents": name,
        "dataset": config.dataset_of(name).dump("reference", "further_references", "folder"),
        "autoencoder": config.autoencoder_of(name).settings(),
        **entry.dump("dataset", "autoencoder"),
    }


def _slice_train(config: Config, name: str) -> dict[str, Any]:
    checkpoint = config.get("checkpoints", name)
    train = checkpoint.train
    if train is None:
        if checkpoint.exact is not None:
            raise UserError(f"checkpoints.{name} is an exact field: make it with make-exact instead of training it")
        raise UserError(f"checkpoints.{name} comes from a weights file: import it instead of training it")
    on_the_fly = {}
    if (pixels := config.latents[train.latents].encoded_from) is not None:
        on_the_fly = {"encode": True, "pixel_autoencoder": config.autoencoder_of(pixels).settings()}
    return {
        "checkpoint": name,
        "train": {**train.dump("model"), "model": config.network_options(name)},
        "autoencoder": config.autoencoder_of(train.latents).settings(),
        **on_the_fly,
    }


def _slice_import_weights(config: Config, name: str) -> dict[str, Any]:
    checkpoint = config.get("checkpoints", name)
    weights = checkpoint.weights
    if weights is None:
        if checkpoint.exact is not None:
            raise UserError(f"checkpoints.{name} is an exact field: make it with make-exact instead of importing it")
        raise UserError(f"checkpoints.{name} is trained here: train it instead of importing it")
    published = {} if weights.download is None else {"source": config.downloads[weights.download].dump()}
    own = {**weights.dump("model", "latents", "interpolant"), **published, "model": config.network_options(name)}
    return {"checkpoint": name, "weights": own}


def _slice_make_exact(config: Config, name: str) -> dict[str, Any]:
    exact = config.get("checkpoints", name).exact
    if exact is None:
        raise UserError(f"checkpoints.{name} is no exact field: train or import it instead")
    dataset = config.dataset_of(exact.latents)
    known = {"spectrum": dataset.spectrum.dump()} if isinstance(dataset, Gaussian) and exact.kind == "gaussian" else {}
    return {
        "checkpoint": name,
        "exact": {**exact.dump(), **known},
        "model": config.network_options(name),
        "autoencoder": config.autoencoder_of(exact.latents).settings(),
    }


def _slice_sample(config: Config, checkpoint: str, sampler: str) -> dict[str, Any]:
    check_pair(config, Pair(checkpoint, sampler))
    check_images(config, checkpoint)
    origin = config.checkpoints[checkpoint].origin
    dataset = config.dataset_of(origin.latents)
    interpolant = {} if origin.interpolant is None else {"interpolant": origin.interpolant}
    guide = config.samplers[sampler].guidance.guide
    shifted = getattr(config.samplers[sampler], "time_shift", None) is not None
    return {
        "checkpoint": checkpoint,
        "sampler_name": sampler,
        "sampler": config.samplers[sampler].dump(),
        "model": config.network_options(checkpoint),
        **({} if guide is None else {"guide_model": config.network_options(guide)}),
        **({"clock": config.clock_of(checkpoint)} if shifted else {}),
        "autoencoder": config.autoencoder_of(origin.latents).settings(),
        "num_classes": dataset.num_classes,
        "resolution": dataset.resolution,
        **interpolant,
    }


def _slice_train_clock(config: Config, name: str) -> dict[str, Any]:
    entry = config.get("clocks", name)
    channels, size = config.latent_shape(name)
    return {"clock_name": name, "clock": entry.dump(), "latent_shape": [channels, size, size], **_read(config, name)}


def _slice_slow_flow(config: Config, checkpoint: str, sampler: str) -> dict[str, Any]:
    check_slow_flow(config, Pair(checkpoint, sampler))
    assert config.slow_flow is not None
    origin, entry = config.checkpoints[checkpoint].origin, config.samplers[sampler]
    guide, clock = entry.guidance.guide, config.clock_of(checkpoint)
    return {
        "checkpoint": checkpoint,
        "sampler_name": sampler,
        # Labels are those of the real pairs, and no state is decoded.
        "sampler": entry.dump("labels", "to_uint8"),
        "model": config.network_options(checkpoint),
        **({} if guide is None else {"guide_model": config.network_options(guide)}),
        "num_classes": config.dataset_of(origin.latents).num_classes,
        "interpolant": origin.interpolant,
        **({} if clock is None else {"clock": clock}),
        "slow_flow": config.slow_flow.dump(),
        **_read(config, origin.latents),
    }


def _read(config: Config, latents: str) -> dict[str, Any]:
    """Return what it takes to read a cache as latents, some of which are encoded from cached pixels."""
    read: dict[str, Any] = {"autoencoder": config.autoencoder_of(latents).settings()}
    if (pixels := config.latents[latents].encoded_from) is not None:
        read |= {"encode": True, "pixel_autoencoder": config.autoencoder_of(pixels).settings()}
    return read


def _slice_slow_flow_figure(config: Config, name: str, sampler: str | None = None) -> dict[str, Any]:
    """Return the slice of a figure entry, or of a checkpoint under a sampler beside the one that it starts from."""
    if sampler is None:
        figure = config.get("figures", name)
        paper = {} if figure.paper is None else {"paper": figure.paper.dump()}
        settings = {
            "title": figure.title,
            "sampler": figure.sampler,
            "arms": [arm.dump() for arm in figure.arms],
            **paper,
        }
    else:
        check_slow_flow(config, Pair(name, sampler))
        names = [before] if (before := config.parent(name)) is not None else []
        arms = [{"checkpoint": shown, "label": shown} for shown in (*names, name)]
        settings = {"title": f"Slow Flow of {name}", "sampler": sampler, "arms": arms}
    settings["protocol"] = config.samplers[settings["sampler"]].description
    if config.stand_ins is not None:
        settings["title"] = f"REHEARSAL: {settings['title']}"
    return settings


def _slice_theory(config: Config) -> dict[str, Any]:
    if config.theory is None:
        raise UserError(
            "theory: missing from the config, and nothing has a default: add spectra, dimensions, gammas, steps, held, "
            "numbers, seed"
        )
    return {"theory": config.theory.dump()}


def _slice_train_extractor(config: Config, name: str) -> dict[str, Any]:
    entry = config.get("extractors", name)
    if not isinstance(entry, Classifier):
        raise UserError(f"extractors.{name} is downloaded: there is nothing to train")
    return {
        "extractor_name": name,
        "extractor": entry.dump(),
        "autoencoder": config.autoencoder_of(entry.latents).settings(),
    }


def _slice_make_reference(config: Config, name: str) -> dict[str, Any]:
    entry = config.get("references", name)
    encoded = {} if entry.latents is None else {"autoencoder": config.autoencoder_of(entry.latents).settings()}
    return {
        "reference_name": name,
        "reference": entry.dump(),
        **encoded,
        "extractor": config.extractors[entry.extractor].network(),
    }


def _slice_evaluate(config: Config, checkpoint: str, sampler: str, reference: str | None = None) -> dict[str, Any]:
    check_pair(config, Pair(checkpoint, sampler))
    check_images(config, checkpoint)
    entry = config.samplers[sampler]
    known = config.references_of(checkpoint)
    name = reference or config.reference_of(checkpoint)
    if name not in known:
        raise UserError(f"'{name}' is no reference for the samples of '{checkpoint}'{did_you_mean(name, known)}")
    extractor = config.references[name].extractor
    calls = {} if entry.call_times is None else {"network_calls_per_image": network_calls(entry)}
    return {
        "checkpoint": checkpoint,
        "sampler_name": sampler,
        "sampler": entry.dump(),
        **calls,
        "reference_name": name,
        "extractor_name": extractor,
        "extractor": config.extractors[extractor].network(),
    }


def network_calls(sampler: Any) -> int:
    """Return the forward passes per image; a guided one counts twice, for the class and for its absence or guide.

    0 where the solver chooses its own steps.
    """
    if sampler.call_times is None:
        return 0
    return sum(1 + sampler.guidance.acts_at(t) for t in sampler.call_times)


def _slice_row(config: Config, table: str, name: str) -> dict[str, Any]:
    row = config.row(table, name)
    made_by = {} if row.checkpoint is None else {"made_by": _made_by(config, config.checkpoints[row.checkpoint])}
    own = list(dict.fromkeys((row.samplers or {}).values()))
    sampled_by = [f"{config.samplers[name].description} ({config.samplers[name].protocol})" for name in own]
    protocol = {"sampled_by": sampled_by} if sampled_by else {}
    return {
        "table": table,
        "row": name,
        **row.dump("name", "samplers"),
        **_measured(config, table, row),
        **made_by,
        **protocol,
        **_replicated(config, table, row),
    }


def _measured(config: Config, table: str, row: Row) -> dict[str, Any]:
    columns = config.tables[table].columns
    solvers = {config.samplers[column.sampler].solver for column in columns if column.sampler is not None}
    shown = [
        {"metric": column.metric, **_sampler_of(config, row, column, named=len(solvers) > 1)}
        if row.checkpoint
        else {"metric": column.metric}
        for column in columns
    ]
    return {"columns": shown}


def _replicated(config: Config, table: str, row: Row) -> dict[str, Any]:
    """Return the replicates of a row and of its controls; nothing in a table without replicates."""
    if config.tables[table].replicates is None or row.checkpoint is None:
        return {}
    made = [replicate._asdict() for replicate in replicates(config, table, row)]
    controls = []
    for name in row.controls:
        control = config.row(table, name)
        replicated = _replicated(config, table, control)["replicates"]
        parts = {"row": name, "label": control.label, "replicates": replicated}
        controls.append({**parts, **_measured(config, table, control)})
    return {"replicates": made, **({"controls": controls} if controls else {})}


def _sampler_of(config: Config, row: Row, column: Column, *, named: bool) -> dict[str, Any]:
    """Return how a cell is sampled; with its solver (`named`) where the table has several."""
    name = row.sampler_of(column)
    sampler = config.samplers[name]
    steps = {} if isinstance(sampler, Dopri5) else {"num_steps": sampler.num_steps}
    solver = {"solver": sampler.solver} if named else {}
    assert row.checkpoint is not None, "only measured rows are sampled"
    reference = config.reference_for(row.checkpoint, column.metric)
    other = {} if reference == config.reference_of(row.checkpoint) else {"reference": reference}
    return {"sampler": name, **other, "guidance": sampler.guidance.scale, **steps, **solver}


def _made_by(config: Config, checkpoint: Checkpoint) -> dict[str, Any]:
    if checkpoint.exact is not None:
        return {"exact": checkpoint.exact.dump()}
    if checkpoint.weights is not None:
        weights = checkpoint.weights
        return {"file": weights.file if weights.download is None else config.downloads[weights.download].address}
    assert checkpoint.train is not None
    shown = ("init", "law", "gamma", "shift", "num_steps", "batch_size", "learning_rate", "seed")
    arms = ("input_perturbation", "self_rollout", "endpoint_target")
    train = checkpoint.train.dump()
    return {key: train[key] for key in (*shown, *arms) if key in train}


def _slice_figure(config: Config, table: str, figure: str) -> dict[str, Any]:
    entry = config.get("tables", table)
    if figure not in entry.figures:
        raise UserError(f"'{figure}' is not a figure of table '{table}'{did_you_mean(figure, entry.figures)}")
    arms = [{"label": row.label, "row": row.key, "checkpoint": row.checkpoint} for row in entry.rows if row.checkpoint]
    settings = {"table": table, "figure": figure, "arms": arms}
    if entry.replicates is not None:  # what shows one training shows the first
        for arm in arms:
            arm["checkpoint"] = replicates(config, table, config.row(table, arm["row"]))[0].checkpoint
    if figure == "samples":  # those of the most careful sampler
        columns = [column for column in entry.columns if column.sampler is not None]
        shown = max(columns, key=lambda column: network_calls(config.samplers[column.sampler]))
        for arm in arms:
            row = config.row(table, arm["row"])
            arm["sampler"] = config.makers(table, row)[0][1][row.sampler_of(shown)]
        settings["title"] = config.samplers[shown.sampler].description
    return settings


def _slice_render(config: Config, name: str) -> dict[str, Any]:
    table = config.get("tables", name)
    columns = []
    for column in table.columns:
        sampler = None if column.sampler is None else config.samplers[column.sampler]
        label = column.label or (sampler.description if sampler else "")
        columns.append({"label": label, "metric": column.metric})
        if sampler:
            protocol = sampler.protocol
            if table.replicates is not None:
                seeds = ", ".join(map(str, table.replicates.sampling))
                protocol = protocol.replace(sampler.seed_text, f"seeds {seeds}")
            columns[-1] |= {"sampler": column.sampler or "", "protocol": protocol}
    rows = [row.key for row in table.rows]
    settings = {"table": name, "columns": columns, "rows": rows, **table.dump("columns", "rows")}
    if config.stand_ins is not None:
        settings["title"] = f"REHEARSAL: {table.title}"
        settings["notes"] = [REHEARSAL_NOTE, *settings["notes"]]
    return settings


def _slice_report(config: Config) -> dict[str, Any]:
    if config.report is None:
        raise UserError("report: missing from the config: write what the page shows, as config.yaml does")
    tables = {
        name: {
            "render": _slice_render(config, name),
            "rows": [_slice_row(config, name, row.key) for row in config.get("tables", name).rows],
        }
        for name in config.report.tables
    }
    return {**config.report.dump(), "rehearsal": config.stand_ins is not None, "tables": tables}


SLICES: dict[str, Callable[..., dict[str, Any]]] = {
    "stand_ins": _slice_stand_ins,
    "download": _slice_download,
    "cache_latents": _slice_cache_latents,
    "train": _slice_train,
    "import_weights": _slice_import_weights,
    "make_exact": _slice_make_exact,
    "sample": _slice_sample,
    "train_clock": _slice_train_clock,
    "slow_flow": _slice_slow_flow,
    "slow_flow_figure": _slice_slow_flow_figure,
    "theory": _slice_theory,
    "train_extractor": _slice_train_extractor,
    "make_reference": _slice_make_reference,
    "evaluate": _slice_evaluate,
    "row": _slice_row,
    "figure": _slice_figure,
    "render": _slice_render,
    "report": _slice_report,
}


def to_json(settings: dict[str, Any]) -> str:
    """Return the one canonical JSON text of a slice: sorted keys, no spaces, ASCII."""
    return json.dumps(settings, sort_keys=True, separators=(",", ":"), allow_nan=False)


def slice_key(settings: dict[str, Any], *parents_sha256: str) -> str:
    """Return 16 hex digits that stand for a slice and the files it starts from."""
    text = "\n".join([to_json(settings), *parents_sha256])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
