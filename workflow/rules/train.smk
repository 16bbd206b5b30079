# Resume state lives in scratch/, which Snakemake does not know: declared outputs are deleted before every attempt.
rule train:
    input:
        unpack(alignment),
        latents=lambda wildcards: whole_latents(
            settings.latents_of(wildcards.checkpoint)
        ),
        autoencoder=training_autoencoder,
        init=ancient(parent_weights),
        init_record=parent_record,
    output:
        weights=paths.weights("{checkpoint}"),
        losses=paths.losses("{checkpoint}"),
        record=record_of(paths.weights("{checkpoint}")),
    log:
        "logs/train/{checkpoint}.log",
    wildcard_constraints:
        checkpoint=one_of(settings.trained_checkpoints()),
    # A model that starts from scratch stands alone at the head of the chain; arms run side by side.
    threads: train_threads
    resources:
        gpu=gpus(8),
        cpus_per_gpu=8,
        nodes=1,
        mem_mb=sized(digits=4000, imagenet=128000),
        runtime=sized(digits=60, imagenet=1440),
    params:
        settings=slice_of("train", "checkpoint"),
        launch=launcher,
        limits=limits,
        batch=rows_per_pass("--micro-batch"),
        init=option("--init", "init"),
        pixels=option("--pixels", "pixels"),
        encoder=option("--encoder", "encoder"),
        autoencoder=training_autoencoder_option,
    shell:
        "{params.launch} train {wildcards.checkpoint:q} --settings {params.settings:q}"
        " --latents {input.latents:q} {params.init} {params.pixels} {params.encoder} {params.autoencoder}"
        " {params.batch} {params.limits} --out {output.weights:q}"
        " --tensorboard logs/tensorboard/{wildcards.checkpoint:q}"
        " --log {log:q}"


rule import_weights:
    input:
        file=weights_file,
    output:
        weights=paths.weights("{checkpoint}"),
        record=record_of(paths.weights("{checkpoint}")),
    log:
        "logs/import_weights/{checkpoint}.log",
    wildcard_constraints:
        checkpoint=one_of(settings.imported_checkpoints()),
    resources:
        mem_mb=sized(digits=4000, imagenet=32000),
        runtime=60,
    params:
        settings=slice_of("import_weights", "checkpoint"),
    shell:
        "python -m mixflow import-weights {wildcards.checkpoint:q} --settings {params.settings:q}"
        " --file {input.file:q} --out {output.weights:q} --log {log:q}"


rule make_exact:
    input:
        latents=exact_latents,
    output:
        weights=paths.weights("{checkpoint}"),
        record=record_of(paths.weights("{checkpoint}")),
    log:
        "logs/make_exact/{checkpoint}.log",
    wildcard_constraints:
        checkpoint=one_of(settings.exact_checkpoints()),
    resources:
        mem_mb=sized(digits=4000, imagenet=128000),
        runtime=60,
    params:
        settings=slice_of("make_exact", "checkpoint"),
        latents=option("--latents", "latents"),
    shell:
        "python -m mixflow make-exact {wildcards.checkpoint:q} --settings {params.settings:q} {params.latents}"
        " --out {output.weights:q} --log {log:q}"
