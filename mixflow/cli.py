"""`python -m mixflow VERB ...`: arguments only; each verb is a stage of its own.

Every verb takes its settings either from config.yaml by entry name, or, as the pipeline's rules do, as one JSON slice.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mixflow import __version__
from mixflow.runtime import paths
from mixflow.runtime.errors import UserError

EXIT_USER_ERROR = 2
SECONDS_TO_SPEAK = 5.0


def main(arguments: list[str] | None = None) -> None:
    """Run one verb. Exit codes: 0 done, 2 the user can mend it, 75 saved but unfinished (run it again), 1 a bug."""
    options = _parser().parse_args(arguments)
    from mixflow.runtime.files import disk_error, write_errors
    from mixflow.runtime.progress import log, start_logging
    from mixflow.runtime.stopping import EXIT_UNFINISHED, Unfinished

    quiet, file = int(os.environ.get("RANK", "0")) > 0, getattr(options, "log", None)
    start_logging(None, quiet)
    try:
        if file is not None:
            with write_errors(Path(file)):
                start_logging(file, quiet)
        options.run(options)
    except UserError as error:
        if quiet:
            _wait_for_the_first_process(file)
        log.error("%s", error)
        sys.exit(EXIT_USER_ERROR)
    except Unfinished as error:
        log.warning("%s: run the same command again to continue", error)
        sys.exit(EXIT_UNFINISHED)
    except Exception as error:
        if quiet:
            _wait_for_the_first_process(file)
        if (told := disk_error(error)) is not None:
            log.error("%s", told)
            sys.exit(EXIT_USER_ERROR)
        # The traceback belongs in the log file too; the interpreter prints it once more on the terminal.
        log.exception("this is a bug in mixflow, or in what it builds on")
        sys.exit(1)


def _wait_for_the_first_process(file: str | None) -> None:
    """Of several processes the first says what is wrong; the launcher then ends the others, or else they say it too.

    Without it the launcher may end the first for the failure of a quiet one, and nothing is said at all.
    """
    from mixflow.runtime.progress import start_logging

    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(SECONDS_TO_SPEAK)
    start_logging(file)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mixflow", description="MixFlow training (arXiv 2512.19311), stage by stage.", epilog=__doc__
    )
    parser.add_argument("--version", action="version", version=f"mixflow {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    verb = _verb(verbs, "download", _download, "fetch published files, check their hashes, and record them")
    _settings(verb, "DOWNLOAD")
    verb.add_argument("--out", type=Path, help="record to write; the files go to downloads/DOWNLOAD/")

    verb = _verb(verbs, "cache-latents", _cache_latents, "encode a dataset once, into shards and an index")
    _settings(verb, "LATENTS")
    verb.add_argument("--images", type=Path, metavar="FOLDER", help="the folder that holds train/ (imagenet)")
    _autoencoder_files(verb)
    verb.add_argument("--out", type=Path, help="index.json to write; shards go beside it")
    verb.add_argument("--workers", type=int, metavar="N", help="threads that read images (default: the cores)")
    verb.add_argument(
        "--batch", type=int, default=64, metavar="N", help="images read and encoded at a time (default %(default)s)"
    )
    _long_running(verb)

    verb = _verb(verbs, "train", _train, "train a checkpoint, from scratch or from another one; resumes after any kill")
    _settings(verb, "CHECKPOINT")
    verb.add_argument("--latents", type=Path, help="index.json of the latent cache")
    verb.add_argument("--init", type=Path, help="weights to start from")
    verb.add_argument("--pixels", type=Path, help="index.json of the images, for REPA's alignment")
    verb.add_argument("--encoder", type=Path, metavar="RECORD", help="record of its image encoder's download")
    _autoencoder_files(verb)
    verb.add_argument("--out", type=Path, help="model.safetensors to write (EMA weights)")
    verb.add_argument("--micro-batch", type=int, metavar="N", help="rows per forward pass on one device")
    verb.add_argument(
        "--save-every", type=float, default=20.0, metavar="SECONDS",
        help="at least between resume points; rarer where saving is slow (default %(default)s)",
    )  # fmt: skip
    verb.add_argument("--tensorboard", type=Path, metavar="FOLDER", help="write loss curves there")
    _long_running(verb)

    verb = _verb(
        verbs, "import-weights", _import_weights, "take a weights file of your own, or a peer's, as checkpoint"
    )
    _settings(verb, "CHECKPOINT")
    verb.add_argument("--file", type=Path, help="the weights file, or the record of its download")
    verb.add_argument("--out", type=Path, help="model.safetensors to write")

    verb = _verb(verbs, "make-exact", _make_exact, "write a velocity field that is known exactly, as a checkpoint")
    _settings(verb, "CHECKPOINT")
    verb.add_argument("--latents", type=Path, help="index.json of the latent cache that it is made of, where it is")
    verb.add_argument("--out", type=Path, help="model.safetensors to write")

    verb = _verb(
        verbs, "export-weights", _export_weights, "write a checkpoint of ours as the .pt file that SiT and REPA read"
    )
    verb.add_argument("weights", type=Path, metavar="WEIGHTS", help="model.safetensors of a checkpoint")
    verb.add_argument(
        "--velocity-head", action="store_true",
        help="leave out the unused half of SiT's 8-channel head, as its sample.py --ckpt wants",
    )  # fmt: skip
    verb.add_argument("--out", type=Path, required=True, help=".pt to write")

    verb = _verb(
        verbs, "convert-weights", _convert_weights, "turn a pickled weights file that may hold code into safetensors"
    )
    verb.add_argument("file", type=Path, metavar="FILE", help="the file that was refused")
    verb.add_argument("--trust", action="store_true", help="yes, run whatever code is in it")
    verb.add_argument("--out", type=Path, required=True, help=".safetensors to write")

    verb = _verb(verbs, "sample", _sample, "draw images from a checkpoint; resumes after any kill")
    _settings(verb, "CHECKPOINT", "SAMPLER")
    verb.add_argument("--weights", type=Path, help="model.safetensors of the checkpoint")
    verb.add_argument("--guide", type=Path, metavar="WEIGHTS", help="model.safetensors of the network that guides it")
    verb.add_argument("--clock", type=Path, metavar="WEIGHTS", help="model.safetensors of the clock of its latents")
    _autoencoder_files(verb)
    verb.add_argument("--out", type=Path, help="samples.npz to write")
    verb.add_argument(
        "--batch", type=int, default=250, metavar="N", help="images per forward pass (default %(default)s)"
    )
    _long_running(verb)

    verb = _verb(verbs, "train-clock", _train_clock, "train the small network that reads the time off states")
    _settings(verb, "LATENTS")
    verb.add_argument("--cache", type=Path, help="index.json of the latent cache")
    _autoencoder_files(verb)
    verb.add_argument("--out", type=Path, help="model.safetensors to write")
    _long_running(verb)

    verb = _verb(verbs, "slow-flow", _slow_flow, "say how far generated states lag behind their time; resumes")
    _settings(verb, "CHECKPOINT", "SAMPLER")
    verb.add_argument("--weights", type=Path, help="model.safetensors of the checkpoint")
    verb.add_argument("--guide", type=Path, metavar="WEIGHTS", help="model.safetensors of the network that guides it")
    verb.add_argument("--latents", type=Path, help="index.json of the latent cache that it was trained on")
    verb.add_argument("--clock", type=Path, metavar="WEIGHTS", help="model.safetensors of the learned clock")
    _autoencoder_files(verb)
    verb.add_argument("--out", type=Path, help="slow_flow.json to write")
    verb.add_argument(
        "--batch", type=int, default=250, metavar="N", help="images per forward pass (default %(default)s)"
    )
    _long_running(verb)

    verb = _verb(verbs, "draw-slow-flow", _draw_slow_flow, "draw Slow Flow of a figure's checkpoints, or of one")
    verb.add_argument("figure", metavar="FIGURE|CHECKPOINT", help="entry of the figures, or of the checkpoints with")
    verb.add_argument("sampler", nargs="?", metavar="SAMPLER", help="a sampler, beside the checkpoint it starts from")
    _configs(verb)
    verb.add_argument("--files", type=Path, nargs="+", help="slow_flow.json of each arm, in order")
    verb.add_argument("--out", type=Path, help="PNG to write")

    verb = _verb(verbs, "train-extractor", _train_extractor, "train the feature network that compares images")
    _settings(verb, "EXTRACTOR")
    verb.add_argument("--latents", type=Path, help="index.json of the latent cache")
    verb.add_argument("--out", type=Path, help="model.safetensors to write")

    verb = _verb(verbs, "make-reference", _make_reference, "prepare what samples are compared with")
    _settings(verb, "REFERENCE")
    verb.add_argument("--source", type=Path, help="index.json of the latents, or record of the reference's download")
    verb.add_argument("--extractor", type=Path, help="weights of the feature network, or record of their download")
    verb.add_argument("--out", type=Path, help="reference.safetensors to write")
    _long_running(verb)

    verb = _verb(verbs, "evaluate", _evaluate, "FID, IS, precision, recall and more of sample files or image folders")
    verb.epilog = (
        "A sample file of the pipeline, results/samples/CHECKPOINT/SAMPLER/samples.npz, needs no further option: "
        "config.yaml says what it is compared with. For any other give --reference. Several SAMPLES, from disjoint "
        "seeds, give mean, spread and minimum. On several GPUs: torchrun --standalone --nproc-per-node N -m -- mixflow "
        "evaluate ... docs/evaluation.md says which numbers are equal to whose."
    )
    verb.add_argument(
        "samples", type=Path, nargs="+", metavar="SAMPLES", help=".npz with arr_0 uint8 [N,H,W,3], or folder of images"
    )
    verb.add_argument(
        "--reference", type=Path, metavar="REF",
        help="ADM's .npz (VIRTUAL_imagenet256_labeled.npz), EDM2's .pkl, or what --make-reference wrote",
    )  # fmt: skip
    verb.add_argument(
        "--metrics", metavar="LIST",
        help="of fid, sfid, is, pr (precision and recall as ADM's), pr_exact, kid, dc (density and coverage), "
        "fd_dinov2; or all (default: fid,sfid,is,pr as far as the reference goes)",
    )  # fmt: skip
    verb.add_argument("--compat", choices=["adm"], help="OpenAI's five numbers, and what is claimed of their equality")
    verb.add_argument(
        "--make-reference", type=Path, metavar="OUT", help="write a reference from SAMPLES (one) in place of metrics"
    )
    verb.add_argument(
        "--kept-images", type=int, metavar="N",
        help="of a reference: images kept for precision, recall, KID, density and coverage (default 10,000)",
    )  # fmt: skip
    verb.add_argument(
        "--extractor", type=Path, metavar="FILE",
        help="weights of the feature network, or record of their download (default: fetched, checked, kept)",
    )  # fmt: skip
    verb.add_argument("--tf32", action="store_true", help="allow TF32 on a GPU: faster, not ADM's numbers any more")
    verb.add_argument("--keep-features", action="store_true", help="keep them in scratch/ for other metrics later")
    verb.add_argument("--out", type=Path, help="metrics.json to write (default: in this folder, or the pipeline's)")
    _configs(verb)
    _long_running(verb)

    tables = verbs.add_parser("tables", help="rows, figures and pages of a table", description="Parts of a table.")
    parts = tables.add_subparsers(metavar="PART", required=True)
    verb = _verb(parts, "row", _table_row, "collect the cells of one row from their metrics")
    _settings(verb, "TABLE", "ROW")
    verb.add_argument("--out", type=Path, help="row JSON to write")
    verb = _verb(parts, "figure", _table_figure, "draw one figure of a table")
    _settings(verb, "TABLE", "FIGURE")
    verb.add_argument("--files", type=Path, nargs="+", help="what it is drawn from, one file per arm")
    verb.add_argument("--out", type=Path, help="PNG to write")
    verb = _verb(parts, "render", _table_render, "write a table as Markdown and as one HTML page")
    _settings(verb, "TABLE")
    verb.add_argument("--rows", type=Path, nargs="*", help="row JSON files")
    verb.add_argument("--figures", type=Path, nargs="*", help="PNG files, named after their figures")
    verb.add_argument("--markdown", type=Path, help=".md to write")
    verb.add_argument("--page", type=Path, help=".html to write")

    verb = _verb(parts, "preview", _table_preview, "print a table as far as it is measured, as Markdown")
    _settings(verb, "TABLE")

    verb = _verb(
        verbs, "theory", _theory, "predict lag, shrinkage and left noise of networks without error, and draw them"
    )
    _configs(verb)
    verb.add_argument("--out", type=Path, help="theory.json to write")
    verb.add_argument("--figure", type=Path, help="PNG to write")

    verb = _verb(verbs, "report", _report, "write one page of what is there now: answers, tables, figures, provenance")
    verb.add_argument("--config", nargs="+", default=["config.yaml"], metavar="FILE", help="later files overlay")
    verb.add_argument("--key", metavar="DIGITS", help="stop unless the config files give the report of this key")
    verb.add_argument("--out", type=Path, help=".html to write")
    verb.add_argument("--log", metavar="FILE", help="append log lines to this file too")

    verb = _verb(verbs, "make-stand-ins", _make_stand_ins, "make the small random files of the rehearsal")
    _settings(verb)
    verb.add_argument("--out", type=Path, help="list of the files to write")

    verb = _verb(verbs, "plan", _plan, "say what targets cost before anything runs: jobs, time, downloads, disk")
    verb.add_argument(
        "targets", nargs="+", metavar="TARGET",
        help="tables and figures of config.yaml, paper, digits_science, theory, report, or paths below results/",
    )  # fmt: skip
    verb.add_argument("--gpus", type=int, default=8, metavar="N", help="GPUs to be had (default %(default)s)")
    verb.add_argument("--cores", type=int, metavar="N", help="CPU cores to be had (default: those of this machine)")
    verb.add_argument(
        "--tflops", type=float, default=100.0, metavar="RATE",
        help="assumed of a GPU in TF32 where nothing was measured, in 10^12 a second (default %(default)s)",
    )  # fmt: skip
    verb.add_argument("--from-scratch", action="store_true", help="count what is made already, too")
    _configs(verb)

    verb = _verb(verbs, "where", _where, "say where a table's cells come from: files, state, entries, command")
    verb.add_argument("table", metavar="TABLE", help="table of config.yaml")
    verb.add_argument("row", nargs="?", metavar="ROW", help="row of it (default: all)")
    _configs(verb)

    verb = _verb(verbs, "status", _status, "say how far running and stopped work is, from its files in scratch/")
    verb.add_argument("--scratch", type=Path, default=Path("scratch"), metavar="FOLDER", help="resume state")

    verb = _verb(verbs, "inspect", _inspect, "say what a weights file, latent cache, sample file or result is")
    verb.add_argument("file", type=Path, nargs="+", metavar="FILE")
    verb.add_argument("--json", action="store_true", help="print JSON")

    verb = _verb(verbs, "doctor", _doctor, "say what this machine can run")
    verb.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _verb(verbs: Any, name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
    parser = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(run=run)
    return parser


def _settings(parser: argparse.ArgumentParser, *names: str) -> None:
    """Add the entry names, and the two ways to say what they mean."""
    for name in names:
        parser.add_argument(name.lower(), metavar=name, help="entry of config.yaml")
    _configs(parser)


def _configs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", nargs="+", default=["config.yaml"], metavar="FILE", help="later files overlay")
    parser.add_argument("--settings", metavar="JSON", help="the resolved slice itself, instead of --config")
    parser.add_argument("--log", metavar="FILE", help="append log lines to this file too")


def _autoencoder_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--autoencoder", nargs="+", metavar="[ROLE=]RECORD",
        help="records of the downloads that the autoencoder consists of; RAE's roles are encoder, decoder, statistics",
    )  # fmt: skip


def _long_running(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scratch", type=Path, default=Path("scratch"), metavar="FOLDER", help="resume state")
    parser.add_argument(
        "--time-budget", type=float, metavar="MINUTES", help="save and exit with 75 before this is over"
    )
    parser.add_argument("--gpus", type=int, metavar="N", help="stop at once where fewer GPUs are visible")


def _slice(options: argparse.Namespace, stage: str, *names: str) -> dict[str, Any]:
    """Return the settings of a stage: the JSON given, else the slice of the config files."""
    if options.settings is not None:
        try:
            return json.loads(options.settings)
        except json.JSONDecodeError as error:
            raise UserError(
                f"--settings is not valid JSON ({error}): pass a slice of the config, or --config"
            ) from None
    return _config(options).slice(stage, *names)


def _config(options: argparse.Namespace) -> Any:
    from mixflow.config import load_config

    return load_config(*options.config)


def _say(text: str) -> None:
    """Print an answer, of which the reader (`head`) may want no more than the beginning."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more


def _existing(path: Path, what: str) -> Path:
    if not path.exists():
        raise UserError(f"{what} '{path}' does not exist: make it first, or name it with its option")
    return path


def _recorded(options: argparse.Namespace, given: Path | None, section: str, name: str | None = None) -> Path | None:
    """Return the record of an entry's download: the one given, else where `download` writes it; None without one."""
    if given is not None or options.settings is not None or name is None:
        return given
    download = _config(options).get(section, name).download
    if download is None:
        return None
    return _existing(Path(paths.download(download)), f"the download '{download}'")


def _autoencoder(options: argparse.Namespace, latents: str, *uses: str) -> dict[str, Path]:
    """Return the records of an autoencoder's downloads by role: those given, else what these uses of it need."""
    if options.autoencoder is not None:
        return dict(_role_and_record(text) for text in options.autoencoder)
    if options.settings is not None:
        return {}
    downloads = _config(options).autoencoder_of(latents).files_for(*uses)
    return {role: _existing(Path(paths.download(name)), f"the download '{name}'") for role, name in downloads.items()}


def _role_and_record(text: str) -> tuple[str, Path]:
    role, equals, record = text.partition("=")
    return (role, Path(record)) if equals and role.isalpha() else ("network", Path(text))


def _download(options: argparse.Namespace) -> None:
    settings = _slice(options, "download", options.download)

    from mixflow.stages.download import run

    run(options.download, settings["source"], options.out or Path(paths.download(options.download)))


def _make_stand_ins(options: argparse.Namespace) -> None:
    settings = _slice(options, "stand_ins")

    from mixflow.stages.stand_ins import make_stand_ins

    make_stand_ins(settings, options.out or Path(paths.stand_ins(settings["folder"])))


def _cache_latents(options: argparse.Namespace) -> None:
    settings = _slice(options, "cache_latents", options.latents)
    images = options.images
    if images is None and options.settings is None and settings["dataset"]["kind"] == "imagenet":
        images = Path(_config(options).dataset_of(options.latents).folder)
    autoencoder = _autoencoder(options, options.latents, "encode")

    from mixflow.stages.cache_latents import cache_latents

    cache_latents(
        settings,
        options.out or Path(paths.latents(options.latents)),
        images=images,
        autoencoder=autoencoder,
        scratch=options.scratch,
        batch=options.batch,
        workers=options.workers,
        time_budget_minutes=options.time_budget,
        expected_gpus=options.gpus,
    )


def _train(options: argparse.Namespace) -> None:
    name = options.checkpoint
    settings = _slice(options, "train", name)
    parent = settings["train"]["init"]
    init = None
    if parent != "scratch":
        init = _existing(options.init or Path(paths.weights(parent)), f"the parent of '{name}'")
    latents = _existing(options.latents or _trained_from(options, settings), "the latent cache")
    uses = ("encode", "latents") if settings.get("encode") else ("latents",)
    pixels, encoder = options.pixels, options.encoder
    if (align := settings["train"].get("align")) is not None:
        pixels = _existing(pixels or Path(paths.latents(align["images"])), "the cache of pixels")
        encoder = _recorded(options, encoder, "encoders", align["encoder"])

    from mixflow.stages import train

    train.run(
        settings,
        latents=latents,
        init=init,
        pixels=pixels,
        encoder=encoder,
        autoencoder=_autoencoder(options, settings["train"]["latents"], *uses),
        out=options.out or Path(paths.weights(name)),
        scratch=options.scratch,
        tensorboard=options.tensorboard,
        micro_batch=options.micro_batch,
        save_every_seconds=options.save_every,
        time_budget_minutes=options.time_budget,
        expected_gpus=options.gpus,
    )


def _trained_from(options: argparse.Namespace, settings: dict[str, Any]) -> Path:
    """Return the index of the cache that training reads: of the latents, or of the pixels they are encoded from."""
    latents = settings["train"]["latents"]
    return Path(paths.latents(latents if options.settings is not None else _config(options).cache_of(latents)))


def _import_weights(options: argparse.Namespace) -> None:
    settings = _slice(options, "import_weights", options.checkpoint)
    if (file := options.file) is None:
        own, download = settings["weights"].get("file"), settings["weights"].get("download")
        file = Path(own) if own else _existing(Path(paths.download(download)), f"the download '{download}'")

    from mixflow.stages.import_weights import import_weights

    import_weights(settings, file=file, out=options.out or Path(paths.weights(options.checkpoint)))


def _make_exact(options: argparse.Namespace) -> None:
    settings = _slice(options, "make_exact", options.checkpoint)
    latents = options.latents
    if latents is None and "spectrum" not in settings["exact"]:
        latents = _existing(Path(paths.latents(settings["exact"]["latents"])), "the latent cache")

    from mixflow.stages.make_exact import make_exact

    make_exact(settings, latents=latents, out=options.out or Path(paths.weights(options.checkpoint)))


def _export_weights(options: argparse.Namespace) -> None:
    from mixflow.models import export_weights

    weights = _existing(options.weights, "the weights file")
    export_weights(weights, options.out, velocity_head=options.velocity_head)


def _convert_weights(options: argparse.Namespace) -> None:
    from mixflow.models import convert_weights

    convert_weights(_existing(options.file, "the weights file"), options.out, trust=options.trust)


def _sample(options: argparse.Namespace) -> None:
    checkpoint, sampler = options.checkpoint, options.sampler
    settings = _slice(options, "sample", checkpoint, sampler)
    weights = _existing(options.weights or Path(paths.weights(checkpoint)), "the weights file")
    latents = "" if options.settings is not None else _config(options).latents_of(checkpoint)
    autoencoder = _autoencoder(options, latents, "decode")
    guide = options.guide
    if guide is None and (name := settings["sampler"]["guidance"].get("guide")) is not None:
        guide = _existing(Path(paths.weights(name)), f"the guide '{name}'")
    clock = options.clock
    if clock is None and (name := settings.get("clock")) is not None:
        clock = _existing(Path(paths.clock(name)), f"the clock of '{name}'")

    from mixflow.stages import sample

    sample.run(
        settings,
        weights=weights,
        guide=guide,
        clock=clock,
        autoencoder=autoencoder,
        out=options.out or Path(paths.samples(checkpoint, sampler)),
        scratch=options.scratch,
        batch=options.batch,
        time_budget_minutes=options.time_budget,
        expected_gpus=options.gpus,
    )


def _train_clock(options: argparse.Namespace) -> None:
    name = options.latents
    settings = _slice(options, "train_clock", name)
    autoencoder = _autoencoder(options, name, *(("encode", "latents") if settings.get("encode") else ("latents",)))

    from mixflow.stages.train_clock import train_clock

    train_clock(
        settings,
        latents=_existing(options.cache or _cache_of(options, name), "the latent cache"),
        autoencoder=autoencoder,
        out=options.out or Path(paths.clock(name)),
        scratch=options.scratch,
        time_budget_minutes=options.time_budget,
        expected_gpus=options.gpus,
    )


def _cache_of(options: argparse.Namespace, latents: str) -> Path:
    """Return the index of the cache that latents are read from: their own, or the pixels they are encoded from."""
    return Path(paths.latents(latents if options.settings is not None else _config(options).cache_of(latents)))


def _slow_flow(options: argparse.Namespace) -> None:
    checkpoint, sampler = options.checkpoint, options.sampler
    settings = _slice(options, "slow_flow", checkpoint, sampler)
    latents = "" if options.settings is not None else _config(options).latents_of(checkpoint)
    guide, clock = options.guide, options.clock
    if guide is None and (name := settings["sampler"]["guidance"].get("guide")) is not None:
        guide = _existing(Path(paths.weights(name)), f"the guide '{name}'")
    if clock is None and (name := settings.get("clock")) is not None:
        clock = _existing(Path(paths.clock(name)), f"the clock of '{name}'")
    uses = ("encode", "latents") if settings.get("encode") else ("latents",)

    from mixflow.stages import slow_flow

    slow_flow.run(
        settings,
        weights=_existing(options.weights or Path(paths.weights(checkpoint)), "the weights file"),
        latents=_existing(options.latents or _cache_of(options, latents), "the latent cache"),
        guide=guide,
        clock=clock,
        autoencoder=_autoencoder(options, latents, *uses),
        out=options.out or Path(paths.slow_flow(checkpoint, sampler)),
        scratch=options.scratch,
        batch=options.batch,
        time_budget_minutes=options.time_budget,
        expected_gpus=options.gpus,
    )


def _draw_slow_flow(options: argparse.Namespace) -> None:
    name, sampler = options.figure, options.sampler
    names, out = [name], paths.comparison(name)
    if sampler is not None:
        names, out = [name, sampler], paths.slow_flow(name, sampler, "png")
    settings = _slice(options, "slow_flow_figure", *names)
    files = options.files or [Path(paths.slow_flow(arm["checkpoint"], settings["sampler"])) for arm in settings["arms"]]

    from mixflow.stages.draw_slow_flow import draw_slow_flow

    draw_slow_flow(settings, [_existing(file, "Slow Flow") for file in files], options.out or Path(out))


def _train_extractor(options: argparse.Namespace) -> None:
    settings = _slice(options, "train_extractor", options.extractor)
    latents = options.latents or Path(paths.latents(settings["extractor"]["latents"]))

    from mixflow.stages.evaluate import train_extractor

    train_extractor(
        settings,
        latents=_existing(latents, "the latent cache"),
        out=options.out or Path(paths.extractor(options.extractor)),
    )


def _make_reference(options: argparse.Namespace) -> None:
    name = options.reference
    settings = _slice(options, "make_reference", name)
    source = options.source or _existing(_reference_source(settings["reference"]), "what the reference is made of,")
    extractor = _extractor(options, settings["reference"]["extractor"])

    from mixflow.stages.evaluate import make_reference

    make_reference(
        settings,
        source=source,
        extractor=extractor,
        out=options.out or Path(paths.reference(name)),
        scratch=options.scratch,
        time_budget_minutes=options.time_budget,
        expected_gpus=options.gpus,
    )


def _reference_source(reference: dict[str, Any]) -> Path:
    latents = reference.get("latents")
    return Path(paths.latents(latents) if latents else paths.download(reference["download"]))


def _extractor(options: argparse.Namespace, name: str) -> Path:
    """Return the weights of a feature network that was trained here, or the record of a downloaded one."""
    found = _recorded(options, options.extractor, "extractors", name) or Path(paths.extractor(name))
    return _existing(found, "the feature network")


def _evaluate(options: argparse.Namespace) -> None:
    if options.make_reference is not None:
        _evaluate_reference(options)
    elif options.settings is not None or options.reference is None:
        _evaluate_cells(options)
    else:
        _evaluate_files(options)


def _evaluate_cells(options: argparse.Namespace) -> None:
    """Sample files of the pipeline, each compared with what the config says, or `--settings`."""
    for name in ("metrics", "compat", "kept_images"):
        if getattr(options, name) is not None:
            raise UserError(
                f"--{name.replace('_', '-')} needs --reference: without it SAMPLES are the pipeline's own, measured "
                "in full as config.yaml says"
            )
    for samples in options.samples:
        checkpoint, sampler = paths.sampled(samples)
        settings = _slice(options, "evaluate", checkpoint, sampler)
        reference = options.reference or Path(paths.reference(settings["reference_name"]))
        extractor = _extractor(options, settings["extractor_name"])

        from mixflow.stages.evaluate import evaluate

        evaluate(
            settings,
            samples=_existing(samples, "the sample file"),
            reference=_existing(reference, "the reference"),
            extractor=extractor,
            out=options.out or Path(paths.metrics(checkpoint, sampler)),
            scratch=options.scratch,
            time_budget_minutes=options.time_budget,
            expected_gpus=options.gpus,
        )


def _evaluate_files(options: argparse.Namespace) -> None:
    from mixflow.stages.evaluate_files import evaluate_files, parse_metrics

    if options.kept_images is not None:
        raise UserError("--kept-images belongs to --make-reference: leave it out, or make a reference first")
    table = evaluate_files(
        options.samples,
        reference=options.reference,
        metrics=None if options.metrics is None else parse_metrics(options.metrics),
        weights=options.extractor,
        out=options.out or Path("metrics.json"),
        records=_extractor_records(options),
        compat=options.compat,
        tf32=options.tf32,
        keep_features=options.keep_features,
        scratch=options.scratch,
        time_budget_minutes=options.time_budget,
        expected_gpus=options.gpus,
    )
    if table is not None:
        _say(table)


def _evaluate_reference(options: argparse.Namespace) -> None:
    from mixflow.stages.evaluate_files import make_reference_file

    if len(options.samples) != 1:
        raise UserError(f"--make-reference takes one file or folder, here {len(options.samples)}: put all in one")
    if options.reference is not None or options.compat is not None:
        raise UserError("--make-reference makes a reference and measures nothing: leave out --reference and --compat")
    make_reference_file(
        options.samples[0],
        metrics=options.metrics,
        weights=options.extractor,
        records=_extractor_records(options),
        out=options.make_reference,
        kept_images=options.kept_images,
        tf32=options.tf32,
        scratch=options.scratch,
        time_budget_minutes=options.time_budget,
        expected_gpus=options.gpus,
    )


def _extractor_records(options: argparse.Namespace) -> dict[str, Path]:
    """Return the records of the feature networks that the pipeline has downloaded, by kind."""
    if not all(Path(file).exists() for file in options.config):
        return {}  # the command works without the pipeline
    entries = [entry for entry in _config(options).extractors.values() if entry.download]
    records = {entry.kind: Path(paths.download(entry.download)) for entry in entries}
    return {kind: record for kind, record in records.items() if record.exists()}


def _table_row(options: argparse.Namespace) -> None:
    from mixflow.stages.render_tables import make_row

    table, row = options.table, options.row
    make_row(_slice(options, "row", table, row), out=options.out or Path(paths.row(table, row)))


def _table_figure(options: argparse.Namespace) -> None:
    from mixflow.stages.draw_figures import draw
    from mixflow.tables import figure_files

    settings = _slice(options, "figure", options.table, options.figure)
    files = options.files or [Path(file) for file in figure_files(settings)]
    files = [_existing(file, f"a part of figure '{options.figure}',") for file in files]
    draw(settings, files, options.out or Path(paths.figure(options.table, options.figure)))


def _table_render(options: argparse.Namespace) -> None:
    from mixflow.stages.render_tables import render

    name = options.table
    settings = _slice(options, "render", name)
    rows, figures = options.rows, options.figures
    if rows is None:
        rows = [_existing(Path(paths.row(name, row)), "row") for row in settings["rows"]]
    if figures is None:
        figures = [Path(paths.figure(name, figure)) for figure in settings["figures"]]
    render(
        settings,
        rows=rows,
        figures={figure.stem: figure for figure in figures if figure.exists()},
        markdown=options.markdown or Path(paths.table(name, "md")),
        page=options.page or Path(paths.table(name, "html")),
    )


def _table_preview(options: argparse.Namespace) -> None:
    from mixflow.stages.render_tables import preview

    config = _config(options)
    table = config.slice("render", options.table)
    _say(preview(table, [config.slice("row", options.table, row) for row in table["rows"]]))


def _theory(options: argparse.Namespace) -> None:
    settings = _slice(options, "theory")

    from mixflow.stages.theory import make_theory

    make_theory(
        settings,
        out=options.out or Path(paths.theory("json")),
        figure=options.figure or Path(paths.theory("png")),
    )


def _report(options: argparse.Namespace) -> None:
    config = _config(options)
    if options.key is not None:
        from mixflow.config import slice_key

        if options.key != slice_key(config.slice("report")):
            raise UserError(
                "the config files say another report than Snakemake's config: put what --config changes into a file "
                "and name that with --configfile"
            )

    from mixflow.stages.report import make_report

    make_report(config, options.config, options.out or Path(paths.report()))


def _plan(options: argparse.Namespace) -> None:
    config = _config(options)
    for name, least in (("gpus", 0), ("cores", 1)):
        if (value := getattr(options, name)) is not None and value < least:
            raise UserError(f"--{name} {value} is too few: give at least {least}")
    if not options.tflops > 0:
        raise UserError(f"--tflops {options.tflops:g} is no rate: give a number above 0")

    from mixflow.stages.costs import Machine
    from mixflow.stages.plan import Plan, default_cores, render

    machine = Machine(options.gpus, options.cores or default_cores(), options.tflops)
    plan = Plan(config, options.targets, root=None if options.from_scratch else Path())
    _say(render(plan, options.targets, machine))


def _where(options: argparse.Namespace) -> None:
    config = _config(options)

    from mixflow.stages.where import Where, render

    _say(render(Where(config, options.table), options.row, options.config))


def _status(options: argparse.Namespace) -> None:
    from mixflow.stages.status import pieces, render

    _say(render(pieces(options.scratch), options.scratch))


def _inspect(options: argparse.Namespace) -> None:
    from mixflow.stages.inspect import describe, render

    for file in options.file:
        facts = describe(file)
        _say(json.dumps(facts, indent=2) if options.json else render(facts))


def _doctor(options: argparse.Namespace) -> None:
    from mixflow.stages.doctor import examine, render

    findings = examine()
    _say(json.dumps(findings, indent=2) if options.json else render(findings))
    if findings["problems"]:
        sys.exit(1)
