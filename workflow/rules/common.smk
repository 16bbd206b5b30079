# Config checks, and what the rules look up. Nothing here knows how a stage works.
import re
import shlex

from snakemake.exceptions import WorkflowError

from mixflow import config as mixflow_config
from mixflow.runtime import paths
from mixflow.runtime.errors import UserError
from mixflow.tables import figure_files, figure_paths, metric_files


def user_error(error):
    """One sentence for the user, without a traceback."""
    return WorkflowError(f"mixflow: {error}")


try:
    settings = mixflow_config.resolve(config)
except UserError as error:
    raise user_error(error) from None


wildcard_constraints:
    # Entry names are path components.
    download="[^/]+",
    latents="[^/]+",
    checkpoint="[^/]+",
    sampler="[^/]+",
    table="[^/]+",
    row="[^/]+",
    figure="[^/]+",
    extractor="[^/]+",
    reference="[^/]+",


def slice_of(stage, *names):
    """A params function: the slice of config that decides this stage's result, as JSON, and nothing else."""

    def params(wildcards):
        return mixflow_config.to_json(
            settings.slice(stage, *(wildcards[name] for name in names))
        )

    return params


def one_of(names):
    """A wildcard constraint that matches these names only (and nothing where there are none)."""
    return "|".join(re.escape(name) for name in names) or "(?!)"


# --- what a job asks for


def on_digits(wildcards):
    """Whether a job works on digits or less, which a CPU does in minutes. ImageNet takes GPUs, much memory, and long."""
    if "checkpoint" in wildcards.keys():
        latents = settings.latents_of(wildcards.checkpoint)
    elif "reference" in wildcards.keys():
        latents = settings.get("references", wildcards.reference).latents
    else:
        latents = wildcards.latents
    return latents is not None and settings.dataset_of(latents).kind != "imagenet"


def sized(digits, imagenet):
    """A function of resources: what a job on digits asks for, or one on ImageNet."""
    return lambda wildcards: digits if on_digits(wildcards) else imagenet


def gpus(imagenet):
    """A function of resources: the GPUs of a job on a cluster. Elsewhere all, as `--resources gpu=N` counts them.

    One machine shows every job the same GPUs, so there one job takes all of them, and none where none are counted.
    """

    def count(wildcards):
        if on_digits(wildcards):
            return 0
        # Jobs are counted on a cluster (also in a dry run with its profile), cores elsewhere.
        if workflow.remote_exec or workflow.resource_settings.nodes is not None:
            return imagenet
        here = workflow.global_resources.get("gpu")
        return 0 if here is None else here.value or 0

    return count


def encoding_gpus(wildcards):
    """Pixels are cached as they are: that is the work of CPUs."""
    if settings.autoencoder_of(wildcards.latents).kind == "pixels":
        return 0
    return gpus(8)(wildcards)


def asked_gpus(resources):
    """The GPUs of a job, whichever way a cluster wants to be asked: gpu=8, or gres="gpu:8"."""
    gres = resources.get("gres") or ""
    if gres.startswith("gpu"):
        return int(gres.rpartition(":")[2]) if gres[-1].isdigit() else 1
    return resources.get("gpu", 0)


def launcher(wildcards, resources):
    """One process, or one per GPU of the node, or `--set-resources RULE:processes=N`. No result depends on it.

    `exec`: a signal then reaches Python itself, not a shell that dies of it and takes the job along. `--`: what follows
    are our options, of which torchrun would take --log for one of its own, cut short.
    """
    processes = resources.get("processes") or asked_gpus(resources)
    if processes > 1:
        return f"exec torchrun --standalone --nproc-per-node {processes} -m -- mixflow"
    return "exec python -m mixflow"


def limits(wildcards, resources):
    """Flags of a job that can be continued: stop before a cluster's time limit, and at once without its GPUs."""
    flags = [f"--gpus {asked_gpus(resources)}"] if asked_gpus(resources) else []
    if workflow.remote_exec:
        flags.append(f"--time-budget {resources.runtime}")
    return " ".join(flags)


def rows_per_pass(flag):
    """How many images a device takes at once, where `--set-resources RULE:batch=N` says so. No result depends on it."""
    return lambda wildcards, resources: (
        f"{flag} {resources.batch}" if resources.get("batch") else ""
    )


def whole_latents(name):
    """The index of a latent cache, or of the pixels that latents are encoded from while training.

    A missing or cut shard is told before any job starts.
    """
    index = paths.latents(settings.cache_of(name))
    try:
        mixflow_config.check_latents(index)
    except UserError as error:
        raise user_error(error) from None
    return index


def record_of(path):
    """The small run.json beside a large result: the real trigger, while the large file itself is ancient()."""
    return paths.record(path)


def table_files(table):
    return [
        paths.table(table, "md"),
        paths.table(table, "html"),
        *figure_paths(settings, table),
    ]


# --- files from elsewhere


def stand_ins(*places):
    """The record of the stand-ins, as the input of whatever reads a file among them."""
    made = settings.stand_ins
    if made is None or not any(
        f"{place}/".startswith(f"{made.folder}/") for place in places
    ):
        return []
    return [paths.stand_ins(made.folder)]


def download_inputs(wildcards):
    """A download from a folder of one's own is made again when the files there change."""
    entry = settings.get("downloads", wildcards.download)
    if entry.folder is None:
        return []
    made = stand_ins(entry.folder)
    return made or [
        f"{entry.folder}/{file}" for file in entry.files if not set(file) & set("*?")
    ]


def download_of(section, name):
    """The record of an entry's download, [] where it has none."""
    download = settings.get(section, name).download
    return [paths.download(download)] if download else []


def option(flag, files):
    """A function of params: the flag with the file, nothing where there is none."""
    return lambda wildcards, input: f"{flag} {input[files]}" if input[files] else ""


def autoencoder_files(latents, *uses):
    """The records of the downloads that these uses of an autoencoder need: role -> record."""
    downloads = settings.autoencoder_of(latents).files_for(*uses)
    return {role: paths.download(name) for role, name in downloads.items()}


def autoencoder_inputs(latents_of_job, *uses):
    """An input function: the records of `autoencoder_files` for the latents that a job works on."""
    return lambda wildcards: list(
        autoencoder_files(latents_of_job(wildcards), *uses).values()
    )


def autoencoder_option(latents_of_job, *uses):
    """A params function: the flag with role=record of each, nothing where there are none."""

    def params(wildcards, input):
        files = autoencoder_files(latents_of_job(wildcards), *uses)
        parts = [shlex.quote(f"{role}={record}") for role, record in files.items()]
        return " ".join(["--autoencoder", *parts]) if parts else ""

    return params


def own_latents(wildcards):
    return wildcards.latents


def sampled_latents(wildcards):
    return settings.latents_of(wildcards.checkpoint)


# --- inputs of cache_latents


def images_of(wildcards):
    """Images of a folder are looked at by the job itself; here only stand-ins have to be made first."""
    folder = getattr(settings.dataset_of(wildcards.latents), "folder", None)
    return stand_ins(folder) if folder else []


def folder_of_images(wildcards, input):
    """Where the images lie now. With `input` it is no trigger: a moved folder must encode and retrain nothing."""
    folder = getattr(settings.dataset_of(wildcards.latents), "folder", None)
    return f"--images {shlex.quote(folder)}" if folder else ""


# --- inputs of train and import_weights


def parent_weights(wildcards):
    parent = settings.parent(wildcards.checkpoint)
    return [paths.weights(parent)] if parent else []


def parent_record(wildcards):
    return [record_of(path) for path in parent_weights(wildcards)]


def train_threads(wildcards):
    return 1 if settings.parent(wildcards.checkpoint) else 2


def alignment(wildcards):
    """What REPA's alignment needs besides the latents: the images' pixels and the encoder that looks at them."""
    align = settings.checkpoints[wildcards.checkpoint].train.align
    if align is None:
        return {"pixels": [], "encoder": []}
    return {
        "pixels": whole_latents(align.images),
        "encoder": download_of("encoders", align.encoder),
    }


def training_uses(wildcards):
    """What training asks of the autoencoder: to make latents of what is stored, and first of all to store it."""
    latents = settings.latents[settings.latents_of(wildcards.checkpoint)]
    return ("latents",) if latents.encoded_from is None else ("encode", "latents")


def training_autoencoder(wildcards):
    return autoencoder_inputs(sampled_latents, *training_uses(wildcards))(wildcards)


def training_autoencoder_option(wildcards, input):
    return autoencoder_option(sampled_latents, *training_uses(wildcards))(
        wildcards, input
    )


def weights_file(wildcards):
    """The record of a download, or the user's own file, compared with its entry before any job starts."""
    weights = settings.get("checkpoints", wildcards.checkpoint).weights
    if weights.download is not None:
        return paths.download(weights.download)
    try:
        return mixflow_config.check_weights_file(settings, wildcards.checkpoint)
    except UserError as error:
        raise user_error(error) from None


def exact_latents(wildcards):
    """The cache that an exact field is made of; none where the spectrum of its dataset says all."""
    exact = settings.slice("make_exact", wildcards.checkpoint)["exact"]
    return [] if "spectrum" in exact else whole_latents(exact["latents"])


# --- inputs of sample


def guide_parts(wildcards):
    """The weights of the network that guides, where the sampler names one."""
    guide = settings.get("samplers", wildcards.sampler).guidance.guide
    if guide is None:
        return {"guide": [], "guide_record": []}
    weights = paths.weights(guide)
    return {"guide": ancient(weights), "guide_record": record_of(weights)}


def shifting_clock(wildcards):
    """The learned clock of a checkpoint's latents, where the sampler tells the network what it reads."""
    sampler = settings.get("samplers", wildcards.sampler)
    if getattr(sampler, "time_shift", None) is None:
        return {"clock": [], "clock_record": []}
    return clock_parts(wildcards)


# --- inputs of train_clock, slow_flow and its figures


def clock_uses(latents):
    """What a clock asks of the autoencoder: to make latents of what is stored, and first of all to store it."""
    if settings.latents[latents].encoded_from is None:
        return ("latents",)
    return ("encode", "latents")


def clock_autoencoder(wildcards):
    uses = clock_uses(wildcards.latents)
    return autoencoder_inputs(own_latents, *uses)(wildcards)


def clock_autoencoder_option(wildcards, input):
    uses = clock_uses(wildcards.latents)
    return autoencoder_option(own_latents, *uses)(wildcards, input)


def clock_parts(wildcards):
    """The learned clock of a checkpoint's latents, where there is one."""
    name = settings.clock_of(wildcards.checkpoint)
    if name is None:
        return {"clock": [], "clock_record": []}
    clock = paths.clock(name)
    return {"clock": ancient(clock), "clock_record": record_of(clock)}


def slow_flow_arms(*names):
    """An input function: Slow Flow of every checkpoint in a figure."""

    def files(wildcards):
        figure = settings.slice(
            "slow_flow_figure", *(wildcards[name] for name in names)
        )
        return [
            paths.slow_flow(arm["checkpoint"], figure["sampler"])
            for arm in figure["arms"]
        ]

    return files


# --- inputs of evaluate


def extractor_parts(name):
    """The network that turns images into features, with its record: trained here, or downloaded."""
    if downloaded := download_of("extractors", name):
        return {"extractor": downloaded, "extractor_record": []}
    weights = paths.extractor(name)
    return {"extractor": ancient(weights), "extractor_record": record_of(weights)}


def reference_inputs(wildcards):
    """What a reference is made of: cached images or a published file, and the network that sees them."""
    entry = settings.get("references", wildcards.reference)
    if entry.latents is not None:
        source = whole_latents(entry.latents)
    else:
        source = paths.download(entry.download)
    return {"source": source, **extractor_parts(entry.extractor)}


def reference_parts(wildcards):
    """The reference that a checkpoint's samples are compared with, and the network that sees both."""
    reference = wildcards.get("reference") or settings.reference_of(
        wildcards.checkpoint
    )
    return {
        "reference": ancient(paths.reference(reference)),
        "reference_record": record_of(paths.reference(reference)),
        "extractor": extractor_parts(settings.references[reference].extractor)[
            "extractor"
        ],
    }


# --- inputs of row, figure and render


def row_metrics(wildcards):
    """The metrics of each cell of a row, with the run records that tell how they were made."""
    files = metric_files(settings.slice("row", wildcards.table, wildcards.row))
    return {"metrics": files, "records": [record_of(file) for file in files]}


def figure_inputs(wildcards):
    """Rows are small and stand for themselves; larger files are triggered by the run records beside them."""
    files = figure_files(settings.slice("figure", wildcards.table, wildcards.figure))
    if wildcards.figure in ("steps", "gamma", "variance"):
        return {"drawn_from": files}
    return {
        "drawn_from": ancient(files),
        "records": [record_of(file) for file in files],
    }


def table_parts(wildcards):
    rows = [
        paths.row(wildcards.table, row.key)
        for row in settings.tables[wildcards.table].rows
    ]
    return {"rows": rows, "figures": figure_paths(settings, wildcards.table)}
