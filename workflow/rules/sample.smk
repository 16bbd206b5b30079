rule sample:
    input:
        weights=ancient(paths.weights("{checkpoint}")),
        weights_record=record_of(paths.weights("{checkpoint}")),
        autoencoder=lambda wildcards: autoencoder_of(
            settings.latents_of(wildcards.checkpoint)
        ),
    output:
        samples=paths.samples("{checkpoint}", "{sampler}"),
        record=record_of(paths.samples("{checkpoint}", "{sampler}")),
    log:
        "logs/sample/{checkpoint}/{sampler}.log",
    threads: 1
    resources:
        mem_mb=4000,
        runtime=60,
    params:
        settings=slice_of("sample", "checkpoint", "sampler"),
        launch=launcher,
        batch=rows_per_pass("--batch"),
        autoencoder=option("--autoencoder", "autoencoder"),
    shell:
        "{params.launch} sample {wildcards.checkpoint:q} {wildcards.sampler:q} --settings {params.settings:q}"
        " --weights {input.weights:q} {params.autoencoder} {params.batch} --out {output.samples:q} --log {log:q}"
