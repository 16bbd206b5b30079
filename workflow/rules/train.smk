def parent_weights(wildcards):
    parent = settings.parent(wildcards.checkpoint)
    return [paths.weights(parent)] if parent else []


def parent_record(wildcards):
    return [record_of(path) for path in parent_weights(wildcards)]


def weights_file(wildcards):
    """The user's own file, compared with its entry before any job starts."""
    try:
        return mixflow_config.check_weights_file(settings, wildcards.checkpoint)
    except UserError as error:
        raise user_error(error) from None


# Resume state lives in scratch/, which Snakemake does not know: declared outputs are deleted before every attempt.
rule train:
    input:
        latents=lambda wildcards: whole_latents(settings.latents_of(wildcards.checkpoint)),
        init=ancient(parent_weights),
        init_record=parent_record,
    output:
        weights=paths.weights("{checkpoint}"),
        losses=paths.losses("{checkpoint}"),
        record=record_of(paths.weights("{checkpoint}")),
    params:
        settings=slice_of("train", "checkpoint"),
        launch=launcher,
        init=lambda wildcards, input: f"--init {input.init}" if input.init else "",
    wildcard_constraints:
        checkpoint=one_of(settings.trained_checkpoints()),
    log:
        "logs/train/{checkpoint}.log",
    threads: 2
    resources:
        mem_mb=4000,
        runtime=60,
    shell:
        "{params.launch} train {wildcards.checkpoint:q} --settings {params.settings:q}"
        " --latents {input.latents:q} {params.init} --out {output.weights:q}"
        " --tensorboard logs/tensorboard/{wildcards.checkpoint:q}"
        " --time-budget {resources.runtime} --log {log:q}"


rule import_weights:
    input:
        file=weights_file,
    output:
        weights=paths.weights("{checkpoint}"),
        record=record_of(paths.weights("{checkpoint}")),
    params:
        settings=slice_of("import_weights", "checkpoint"),
    wildcard_constraints:
        checkpoint=one_of(settings.imported_checkpoints()),
    log:
        "logs/import_weights/{checkpoint}.log",
    resources:
        mem_mb=4000,
        runtime=60,
    shell:
        "python -m mixflow import-weights {wildcards.checkpoint:q} --settings {params.settings:q}"
        " --file {input.file:q} --out {output.weights:q} --log {log:q}"
